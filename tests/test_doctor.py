"""The doctor: what is amiss, and one command for each problem."""

import re

import pytest

from tests.helpers.script import ROOT
from utils import doctor

H100 = {"NVIDIA H100": (9, 0)}
CURRENT = dict(cuda="13.0", driver="580.65.06", capabilities=H100, architectures=["sm_80", "sm_90", "sm_100"])


def level_and_text(**changes) -> tuple[str, str]:
    (finding,) = doctor.gpu_findings(**CURRENT | changes)
    assert bool(finding.mend) == (finding.level == "problem")
    return finding.level, f"{finding.what} {finding.mend}"


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
    assert doctor.has_kernels(capability, architectures) is expected


def test_python():
    assert doctor.python_finding((3, 9, 1)).level == "problem"
    assert doctor.python_finding((3, 10, 0)).level == "ok"


def test_packages():
    newest = {name: versions[1] for name, versions in doctor.TESTED.items()}
    assert {finding.level for finding in doctor.package_findings(newest)} == {"ok"}
    found = doctor.package_findings(
        newest | dict(torch="2.13.0+cpu", diffusers="0.8.0", numpy=None, colossalai="0.4.1")
    )
    by_level = {finding.what.split()[0]: finding for finding in found if finding.level != "ok"}
    assert by_level.keys() == {"diffusers", "numpy", "colossalai"}
    assert by_level["diffusers"].level == "note" and by_level["numpy"].level == "problem"
    assert by_level["colossalai"].mend == "python -m pip install --no-deps colossalai==0.5.0"


def test_the_pins_are_among_the_tested_versions():
    pins = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    found = doctor.package_findings(dict(pins, colossalai="0.5.0"))
    assert [str(finding) for finding in found if finding.level != "ok"] == []


def test_this_machine_is_well(capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "ok      torch " in said and "ok      bitsandbytes (optional)" in said and said.endswith("0 problems\n")


@pytest.mark.parametrize(
    "module",
    [
        "NVIDIA UNIX x86_64 Kernel Module  418.39  Sat Feb",
        "NVIDIA UNIX Open Kernel Module for x86_64  418.39  Release",
    ],
)
def test_a_problem_is_exit_code_1_and_told_at_the_start_of_a_run(capsys, monkeypatch, tmp_path, module):
    driver = tmp_path / "version"
    driver.write_text(f"NVRM version: {module} 9 19:19:37 CST 2019\n")
    monkeypatch.setattr(doctor, "DRIVER_FILE", driver)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor.main([]) == 1
    assert "1 problem\n" in capsys.readouterr().out
    (line,) = doctor.problems_of_gpu()
    assert line.startswith("warning: ") and "418.39" in line and "requirements-upstream.txt" in line


def test_an_optional_package_that_fails(monkeypatch):
    monkeypatch.setattr(doctor, "why_not", lambda package: "CUDA Setup failed" if package == "bitsandbytes" else None)
    notes = [finding for finding in doctor.optional_findings() if finding.level == "note"]
    assert [note.mend for note in notes] == ["python -m pip install --force-reinstall --no-deps bitsandbytes"]
