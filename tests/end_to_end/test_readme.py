"""What the README says can be done, done: its commands are run, its table of flags is that of the parser."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.pipelines import write_photos
from tests.helpers.script import ROOT
from utils.arguments import training_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# `git clone` brings a pipeline of the test's; everything else git is asked for, it does not do.
GIT = """#!/bin/sh
if [ "$1" = clone ]; then cp -R "$PIPELINE" "$3"; else echo "git $*" >> "$GIT_LOG"; fi
"""


def test_the_table_of_flags_is_the_parsers():
    table = README[README.index("\n## Flags") :]
    table = table[: table.index("\n## ", 5)]
    named = {flag for line in table.splitlines() if line.startswith("| `--") for flag in _flags_of(line)}
    flags = {flag for action in training_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert flags - {"--help"} == named


def _flags_of(line: str) -> list[str]:
    return re.findall(r"`(--\w+)", line.split(" | ")[0])


def test_every_link_of_the_documentation_leads_to_a_file():
    """Links, and the tests that are named."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for file, name in re.findall(r"`((?:\w+/)+test_\w+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8")):
            path = ROOT / "tests" / file.removeprefix("tests/")
            assert path.is_file() and name in path.read_text(encoding="utf-8"), f"{page.name}: {file} {name}"


@pytest.fixture
def newcomer(tmp_path) -> tuple[Path, dict[str, str]]:
    """A copy of the repository as it was downloaded, and an environment with this Python's programs first."""
    from tests.helpers.pipelines import write_512_pixel_pipeline
    from tests.helpers.script import LAUNCHER_VARIABLES

    tree, programs = tmp_path / "repository", tmp_path / "bin"
    ignored = shutil.ignore_patterns(".git", ".venv", ".legs", ".*_cache", "__pycache__", "stable-diffusion-v1-4")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name in ("output", "result", "logs"):
        shutil.rmtree(tree / name, ignore_errors=True)
    (tree / "test.sh").write_text("exit 0\n")  # it is what runs this test
    write_photos(tree / "my-photos", 3)
    programs.mkdir()
    (programs / "git").write_text(GIT)
    (programs / "git").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= dict(
        PATH=f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        PIPELINE=str(write_512_pixel_pipeline(tmp_path / "pipeline")),
        GIT_LOG=str(tmp_path / "git.log"),
        VENV=sys.prefix,
        NUM_INFERENCE_STEPS="2",
        OMP_NUM_THREADS="1",
    )
    return tree, environment


@pytest.mark.slow
def test_every_command_of_the_readme_runs(newcomer):
    tree, environment = newcomer
    for block in BLOCKS:
        script = re.sub(r"MAX_TRAIN_STEPS=\d+", "MAX_TRAIN_STEPS=30", block)  # its 400 steps take minutes on a CPU
        steps = {} if "MAX_TRAIN_STEPS" in script else dict(MAX_TRAIN_STEPS="20")
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tree,
            env=environment | steps,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
    assert (tree / "result/comparison.png").stat().st_size > 1000
    assert (tree / "my-cat.safetensors").is_file() and (tree / "output-2/run.json").is_file()
    assert len(BLOCKS) >= 6


def test_the_recipes_command_is_in_it():
    assert any("--learning_rate=1e-6" in block and "--max_train_steps=20" in block for block in BLOCKS)
