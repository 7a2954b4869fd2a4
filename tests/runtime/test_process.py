"""A run's clock, the programs in printed commands, lines that fit a terminal, and progress bars."""

import gc
import io
import os
import shlex
import subprocess
import sys
import time

import pytest

from tests.helpers.script import ROOT, run, run_json
from tests.test_architecture import imported, modules
from utils.runtime import process
from utils.runtime.process import nothing_collected, progress_bar, typed, typed_module


def test_a_mark_is_noted_the_first_time(monkeypatch):
    monkeypatch.setattr(process, "_started", time.perf_counter() - 10)
    monkeypatch.setattr(process, "marks", {})
    process.mark("first step")
    before = dict(process.marks)
    time.sleep(0.002)
    process.mark("first step")
    assert process.marks == before and 10 <= before["first step"] < 11


def test_two_runs_in_one_process_record_their_own_times(flags, tmp_path):
    times = []
    for name in ("one", "two"):
        started = time.perf_counter()
        run(flags, output_dir=tmp_path / name, max_train_steps=1)
        seconds = time.perf_counter() - started
        times.append(run_json(tmp_path / name)["result"]["seconds_after_start"])
    assert times[0].keys() == times[1].keys() and times[0] != times[1]
    assert times[1]["saved"] <= seconds


def test_nothing_is_collected_only_inside():
    assert gc.isenabled()
    with nothing_collected():
        assert not gc.isenabled()
        with nothing_collected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


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
    assert typed_module("utils.share") == [typed("python"), "-m", "utils.share"]
    monkeypatch.chdir(tmp_path)
    command = shlex.join([*typed_module("utils.share"), "--help"])
    said = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
    assert said.startswith("usage: python -m utils.share")


@pytest.mark.parametrize(("given", "used"), [(80, 80), (200, 100)])
def test_a_terminal_gets_lines_that_fit(given, used, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(process.shutil, "get_terminal_size", lambda: os.terminal_size((given, 24)))
    lines = process.wrapped("words and --a-flag " * 30).splitlines()
    assert max(map(len, lines)) <= used and len(lines) >= 570 // used
    assert " ".join(lines).split() == ("words and --a-flag " * 30).split()
    assert process.wrapped("  python -m " + "x " * 200) == "  python -m " + "x " * 200


def test_a_log_gets_whole_lines():
    assert process.wrapped("words " * 100) == "words " * 100


def test_a_bar_says_how_far_how_fast_and_how_long(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("class images", 40, "image", done=10) as bar:
        bar.update(30)
        bar.refresh()
        said = sys.stderr.getvalue()
    assert "class images:  25%" in said and "10/40 [" in said
    assert "40/40 [" in said and "image/s]" in said and "<00:00" in said


def test_one_module_makes_them():
    assert {name for name, tree in modules().items() if "tqdm" in imported(tree)} == {"runtime.process"}
