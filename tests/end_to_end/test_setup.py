"""setup.sh, with no package to install, and run.sh's words before anything is trained."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.script import ROOT

PYTHON = getattr(sys, "_base_executable", sys.executable)


@pytest.fixture
def project(tmp_path) -> Path:
    """A project with an environment of no packages, whose stamp says that all is installed."""
    folder = tmp_path / "here it is"
    folder.mkdir()
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "requirements.txt").touch()
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", ".venv"], cwd=folder, check=True)
    (packages,) = (folder / ".venv/lib").glob("python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip/__init__.py").touch()
    (packages / "mine.py").touch()
    script = folder / ".venv/bin/hello"
    script.write_text(f"#!{folder}/.venv/bin/python\nprint('hello')\n")
    count = subprocess.run(["cksum"], input=(folder / "setup.sh").read_bytes(), capture_output=True).stdout.split()[0]
    (folder / f".venv/.installed-requirements-{count.decode()}").touch()
    return folder


def bash(folder: Path, *command: object, **variables: str) -> subprocess.CompletedProcess:
    """A script run in `folder`, with more variables."""
    options = dict(capture_output=True, text=True, env=os.environ | variables, timeout=100)
    return subprocess.run(["bash", *command], cwd=folder, **options)


def setup(project: Path) -> list[str]:
    """What setup.sh says."""
    result = bash(project, "setup.sh", PYTHON=PYTHON)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_whole_environment_is_left_alone(project):
    assert setup(project) == []


def test_a_moved_project(project):
    moved = project.rename(project.with_name("there & then"))
    (said,) = setup(moved)
    assert said == f"setup.sh: .venv was made in {project}/.venv and has moved: its scripts are adapted"
    assert (moved / ".venv/bin/hello").read_text().startswith(f"#!{moved}/.venv/bin/python\n")
    assert setup(moved) == []


def test_a_python_that_has_gone(project):
    for name in ("python", "python3"):
        (project / ".venv/bin" / name).unlink()
        (project / ".venv/bin" / name).symlink_to("/usr/bin/python3.gone")
    (said,) = setup(project)
    assert said.startswith("setup.sh: .venv has lost its Python or its pip: it gets those of Python 3.")
    assert subprocess.run([project / ".venv/bin/python", "-c", "import mine"]).returncode == 0
    assert setup(project) == []


def test_a_users_own_pip_settings(project):
    """PIP_USER, say, of a cluster's profile: pip refuses to install for a user into an environment."""
    (packages,) = (project / ".venv/lib").glob("python*/site-packages")
    (packages / "pip/__main__.py").write_text("import os, sys; print(sys.argv[1:], os.environ.get('PIP_TARGET'))")
    next((project / ".venv").glob(".installed-*")).unlink()
    result = bash(project, "setup.sh", PIP_USER="1", PIP_TARGET="/elsewhere")
    _, *calls = result.stdout.splitlines()
    assert (
        result.returncode == 0 and len(calls) == 2 and all("'--no-user'" in call and "None" in call for call in calls)
    )


@pytest.mark.parametrize(
    ("python", "said"), [("python\r", "there is no $'python\\r'"), ("old", "is Python 3.9.1, but Py")]
)
def test_a_python_that_will_not_do(tmp_path, python, said):
    for name in ("setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "old").write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.1 && exit\nexit 1\n')
    (tmp_path / "old").chmod(0o755)
    result = bash(tmp_path, "setup.sh", PYTHON=python, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and said in result.stderr


def test_a_link_to_an_environment_elsewhere_is_followed(project, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("setup.sh", "requirements.txt"):
        shutil.copy(project / name, other)
    (other / ".venv").symlink_to(project / ".venv")
    assert setup(other) == []


def test_help_needs_no_environment(tmp_path):
    shutil.copy(ROOT / "run.sh", tmp_path)
    result = bash(tmp_path, "run.sh", "--help")
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("Fine-tunes on the photos")
    assert os.listdir(tmp_path) == ["run.sh"]


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        (dict(MAX_TRAIN_STEPS="x"), [], "error: argument --max_train_steps: 'x' is not a whole number"),
        (dict(NUM_IMAGES="x"), [], "error: argument --num_images: 'x' is not a whole number"),
        (dict(INSTANCE_DIR="./photos"), [], "no folder photos"),
        (dict(NPROC="0"), [], "run.sh: NPROC=0 is no number of processes"),
        (dict(NPROC="'two'"), [], "run.sh: NPROC=two is no number"),
        (dict(CHECKPOINT="41"), [], "error: CHECKPOINT=41: of checkpoints there will be checkpoint-50"),
        (dict(VENV="/nowhere\r"), [], "run.sh: there is no $'/nowhere\\r/bin/python': VENV=DIR names"),
        ({}, ["--no_such_flag"], "error: unrecognized arguments: --no_such_flag"),
    ],
)
def test_a_mistake_under_run_sh_is_one_line(variables, flags, said, tmp_path):
    """Called from another folder, in which a relative path is meant."""
    result = bash(tmp_path, ROOT / "run.sh", *flags, **dict(VENV=sys.prefix, OMP_NUM_THREADS="1") | variables)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and said in result.stderr
    assert os.listdir(tmp_path) == []


PYTHON_OF_RUN_SH = """#!/bin/sh
echo "$*" >> "$SAID"
case "$*" in *"before_launch import main"*) exit "$CODE" ;; esac
"""


@pytest.mark.parametrize("code", [0, 1, 143])
def test_what_an_earlier_run_left_is_not_evaluated_after_a_training_that_fails(tmp_path, code):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(PYTHON_OF_RUN_SH)
    (tmp_path / "bin/python").chmod(0o755)
    variables = dict(VENV=str(tmp_path), SAID=str(tmp_path / "said"), CODE=str(code))
    result = bash(ROOT, "run.sh", "--overwrite_output_dir", **variables)
    said = (tmp_path / "said").read_text()
    assert result.returncode == code and "train_dreambooth_colossalai.py" in said
    assert ("evaluate.py" in said) == (code == 0)
    assert said.endswith("--overwrite_output_dir\n")  # its page too


def test_another_folder_lies_over_model(tmp_path):
    shutil.copy(ROOT / "run.sh", tmp_path)
    result = bash(tmp_path, "run.sh", VENV=sys.prefix, PYTHONPATH=str(ROOT))
    assert result.returncode == 2 and "there is no base in ./model, not even its own" in result.stderr


def test_no_file_has_the_line_ends_of_another_system():
    """A clone by Git for Windows, used in WSL: its bash would stop at the first line of run.sh."""
    attributes = subprocess.run(
        ["git", "check-attr", "eol", "--", "run.sh", "setup.sh", "model/tiny-stable-diffusion/tokenizer/merges.txt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if attributes.returncode:
        pytest.skip("not a checkout of git")
    assert attributes.stdout.count("eol: lf") == 3
