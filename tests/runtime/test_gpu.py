"""What is said of an NVIDIA GPU, its driver and torch's build for it."""

import pytest

from utils.runtime import gpu

H100 = {"NVIDIA H100": (9, 0)}
CURRENT = dict(cuda="13.0", driver="580.65.06", capabilities=H100, architectures=["sm_80", "sm_90", "sm_100"])


def level_and_text(**changes) -> tuple[str, str]:
    (finding,) = gpu.gpu_findings(**CURRENT | changes)
    assert bool(finding.command) == (finding.level == "problem")
    return finding.level, f"{finding.what} {finding.command}"


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        (dict(), "ok", "NVIDIA H100 (sm_90), torch's CUDA 13.0"),
        (dict(driver="470.57.02"), "problem", "driver 470.57.02 is too old for torch's CUDA 13.0, which needs 580"),
        (dict(driver="470.57.02", capabilities={}, architectures=[]), "problem", "too old"),
        (dict(driver="535.104", cuda="12.4"), "ok", "CUDA 12.4"),
        (dict(driver="470.57.02", cuda="11.8"), "ok", "CUDA 11.8"),
        (dict(cuda=None, capabilities={}), "problem", "this torch is built for the CPU alone"),
        (dict(capabilities={}), "problem", "torch sees no GPU"),
        (dict(driver=None, capabilities={}), "note", "training runs on the CPU"),
        (dict(driver=None, capabilities={}, is_present=True), "problem", "its driver is not loaded, or too old"),
        (
            dict(driver=None, capabilities={}, is_present=True, cuda=None),
            "problem",
            "NVIDIA GPU, but this torch is built",
        ),
        (dict(capabilities={}, is_hidden=True), "note", "CUDA_VISIBLE_DEVICES hides the GPU"),
        (dict(capabilities={"GTX 1080": (6, 1)}), "problem", "no kernels for it, only sm_80 sm_90 sm_100"),
        (dict(capabilities={"RTX 5090": (12, 0)}), "problem", "no kernels"),
        (dict(capabilities={"RTX 5090": (12, 0)}, architectures=["sm_90", "compute_90"]), "ok", "sm_120"),
    ],
)
def test_gpus(changes, level, said):
    found = level_and_text(**changes)
    assert found[0] == level and said in found[1]


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["compute_90"], True),
        ((9, 0), ["compute_100"], False),
        ((9, 0), [], False),
    ],
)
def test_kernels(capability, architectures, expected):
    assert gpu.has_kernels(capability, architectures) is expected
