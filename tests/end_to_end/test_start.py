"""How soon a mistake or a table is there: what has been imported by then."""

import subprocess
import sys

import pytest

from tests.helpers.pipelines import listing
from tests.helpers.script import EMBEDDED, ROOT, as_argv, run_python
from utils.runtime.gpu import gpu_is_possible

SLOW = {"torch", "diffusers", "transformers", "colossalai"}
IMPORTED = """
import sys
from train_dreambooth_colossalai import main
from utils.command_line import run_main
try:
    code = run_main(main)
except SystemExit as exit:
    code = exit.code
heavy = [name for name in ("torch", "numpy", "PIL", "diffusers", "transformers", "colossalai") if name in sys.modules]
print("exit code", code, "imported", heavy)
"""


@pytest.mark.parametrize("case", ["help", "unknown flag", "no base", "resolution", "foreign output"])
def test_complaints_come_before_torch_is_imported(tmp_path, base, case):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.txt").write_text("mine")
    argv = ["--pretrained_model_name_or_path", base, "--instance_data_dir", tmp_path / "photos"]
    argv += ["--instance_prompt", "a photo"]
    argv += {
        "help": ["--help"],
        "unknown flag": ["--lr", "1"],
        "no base": ["--pretrained_model_name_or_path", tmp_path / "missing"],
        "resolution": ["--resolution", "31", "--output_dir", tmp_path / "new"],
        "foreign output": ["--output_dir", tmp_path / "elsewhere"],
    }[case]
    before = listing(tmp_path)
    result = run_python(IMPORTED, *argv)
    expected = 0 if case == "help" else 2
    assert result.stdout.splitlines()[-1] == f"exit code {expected} imported []"
    lines = result.stderr.splitlines()
    assert lines == [] if case == "help" else (len(lines) == 1 and lines[0].startswith("error: "))
    assert listing(tmp_path) == before


def packages_imported(*argv) -> set[str]:
    """The top-level packages that the script imports with these arguments, by Python's own list."""
    command = [sys.executable, "-X", "importtime", "train_dreambooth_colossalai.py", *map(str, argv)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_help_is_instant():
    found = packages_imported("--help")
    assert "argparse" in found and not found & {*SLOW, "numpy", "PIL"}


def test_the_preflight_of_the_embedded_model_is_quick(tmp_path):
    argv = ["--pretrained_model_name_or_path", EMBEDDED, "--instance_data_dir", ROOT / "instance", "--dry_run"]
    argv += ["--instance_prompt", "a photo of my cat.", "--output_dir", tmp_path / "output", "--resolution", "64"]
    found = packages_imported(*argv)
    assert "PIL" in found and not found & (SLOW - {"torch"} if gpu_is_possible() else SLOW)


@pytest.mark.skipif(gpu_is_possible(), reason="where a GPU may be, torch is asked about it")
def test_the_preflight_needs_no_torch(tmp_path, tiny_pipeline_dir, photos_dir):
    argv = as_argv(dict(pretrained_model_name_or_path=tiny_pipeline_dir, instance_data_dir=photos_dir, dry_run=True))
    argv += ["--instance_prompt=my cat", f"--output_dir={tmp_path / 'output'}", "--resolution=32"]
    program = (
        "import sys; from train_dreambooth_colossalai import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "0 False", result.stderr
    assert "no GPU: training on the CPU" in result.stdout
