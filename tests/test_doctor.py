"""The doctor: what is amiss, and one command for each problem."""

import pytest

from utils import doctor
from utils.runtime import gpu
from utils.runtime.process import versions


def test_packages():
    installed = versions()
    assert {finding.level for finding in doctor.package_findings(installed)} == {"ok"}
    found = doctor.package_findings(installed | dict(numpy="missing", colossalai="0.4.1"))
    by_level = {finding.what.split()[0]: finding for finding in found if finding.level != "ok"}
    assert by_level.keys() == {"numpy", "colossalai"} and by_level["numpy"].level == "problem"
    assert by_level["colossalai"].command == "python -m pip install --no-deps colossalai==0.5.0"


def test_triton_needs_a_compiler_and_pythons_headers(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda *_: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.missing_for_triton() == "no C compiler (gcc or clang)"
    (finding,) = gpu.compiler_findings()
    assert finding.level == "problem" and "no C compiler" in finding.what and "gcc" in finding.command
    (tmp_path / "clang").touch(mode=0o755)
    assert gpu.missing_for_triton() is None and gpu.compiler_findings() == []
    monkeypatch.setenv("CC", "icc")
    assert gpu.missing_for_triton() == "no C compiler (icc)"
    monkeypatch.delenv("CC")
    (tmp_path / "Python.h").unlink()
    assert gpu.missing_for_triton() == f"no {tmp_path}/Python.h"


def test_this_machine_is_well(capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "ok      torch " in said and said.endswith("0 problems\n")


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
    monkeypatch.setattr(gpu, "DRIVER_FILE", driver)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor.main([]) == 1
    assert "1 problem\n" in capsys.readouterr().out
    gpu.say_problems_of_gpu()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "418.39" in line and "requirements-upstream.txt" in line
