"""What is said of an NVIDIA GPU, its driver and torch's build for it."""

from importlib import import_module

import pytest
import torch

from tests.helpers import evaluating
from tests.helpers.script import dry_run
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
        (dict(capabilities={"RTX 3090": (8, 6)}, architectures=["sm_80"]), "ok", "sm_86"),
        (dict(capabilities={"A100": (8, 0)}, architectures=["sm_86", "compute_90"]), "problem", "no kernels"),
        (dict(architectures=["sm_90a"]), "ok", "sm_90"),
        (dict(architectures=[]), "problem", "no kernels"),
        (dict(capabilities={"RTX 5090": (12, 0)}, architectures=["sm_90", "compute_90"]), "ok", "sm_120"),
    ],
)
def test_gpus(changes, level, said):
    found = level_and_text(**changes)
    assert found[0] == level and said in found[1]


@pytest.fixture
def turing(monkeypatch) -> None:
    """The second of this machine's two GPUs is a T4."""
    import_module("utils.preflight.sources")  # or it would keep the answer that is put in here
    found = {0: ("NVIDIA A100", (8, 0)), 1: ("Tesla T4", (7, 5))}
    monkeypatch.setattr(gpu, "gpu_is_usable", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found[device][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device][1])


def test_a_gpu_before_ampere_has_no_bf16(turing, monkeypatch):
    assert gpu.gpu_without_bf16() == "Tesla T4"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu.gpu_without_bf16() is None
    monkeypatch.setattr(gpu, "gpu_is_usable", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu.gpu_without_bf16() is None


@pytest.mark.parametrize("flag", ["--mixed_precision", "--prior_generation_precision"])
def test_training_says_that_fp16_takes_its_place(turing, tiny_pipeline_dir, photos_dir, tmp_path, capsys, flag):
    prior = ["--with_prior_preservation", "--class_prompt=a cat", f"--class_data_dir={tmp_path / 'class'}"]
    code, said, _ = dry_run(tiny_pipeline_dir, photos_dir, tmp_path, capsys, *prior, f"{flag}=bf16")
    assert code == 0 and "Tesla T4 has no bf16 arithmetic: fp16 in its place" in said
    code, said, _ = dry_run(tiny_pipeline_dir, photos_dir, tmp_path, capsys, *prior, f"{flag}=fp16")
    assert code == 0 and "bf16" not in said


def test_sampling_says_so_too(turing, tiny_pipeline_dir, tmp_path, capsys):
    more = [f"--pretrained_model_name_or_path={tiny_pipeline_dir}", "--num_drift_images=0", "--only=generate"]
    assert (
        evaluating.run(tiny_pipeline_dir, tmp_path / "result", *more, "--prompt=a cat", "--mixed_precision=bf16") == 0
    )
    assert "Tesla T4 has no bf16 arithmetic: fp16 in its place" in capsys.readouterr().err
    assert '"mixed_precision": "fp16"' in (tmp_path / "result/samples.json").read_text()
