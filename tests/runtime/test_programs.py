"""The programs in printed commands: what is printed can be typed as it is."""

import shlex
import subprocess
import sys

import pytest

from tests.helpers.script import ROOT
from utils.runtime.programs import typed, typed_module


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A virtual environment in a project's folder, which is the current one, and another Python on the path."""
    for folder in (tmp_path / "project/.venv/bin", tmp_path / "bin"):
        folder.mkdir(parents=True)
        for name in ("python", "torchrun"):
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "project/.venv/bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path


def test_an_environment_that_is_not_activated_is_named(environment, monkeypatch):
    assert typed("python") == ".venv/bin/python" and typed("torchrun") == ".venv/bin/torchrun"
    monkeypatch.chdir(environment)
    assert typed("python") == "project/.venv/bin/python"
    monkeypatch.chdir(environment / "bin")
    assert typed("python") == str(environment / "project/.venv/bin/python")


def test_an_activated_one_is_not(environment, monkeypatch):
    monkeypatch.setenv("PATH", f"{environment / 'project/.venv/bin'}:{environment / 'bin'}")
    assert typed("python") == "python" and typed("torchrun") == "torchrun"


def test_a_program_that_the_environment_lacks_is_only_named(environment):
    (environment / "project/.venv/bin/torchrun").unlink()
    assert typed("torchrun") == "torchrun"


def test_a_module_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert typed_module("utils.export") == [typed("python"), "-m", "utils.export"]
    monkeypatch.chdir(tmp_path)
    command = shlex.join([*typed_module("utils.export"), "--help"])
    said = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
    assert said.startswith("usage: python -m utils.export")
