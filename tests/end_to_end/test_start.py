"""How soon a mistake or a table is there: what has been imported by then."""

import pytest

from tests.helpers.pipelines import listing
from tests.helpers.script import EMBEDDED, ROOT, run_python
from utils.runtime.gpu import gpu_is_possible

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
    imported = ["numpy"] if case in ("resolution", "foreign output") else []  # safetensors reads headers with it
    assert result.stdout.splitlines()[-1] == f"exit code {expected} imported {imported}"
    lines = result.stderr.splitlines()
    assert lines == [] if case == "help" else (len(lines) == 1 and lines[0].startswith("error: "))
    assert listing(tmp_path) == before


@pytest.mark.skipif(gpu_is_possible(), reason="where a GPU may be, torch is asked about it")
def test_the_preflight_needs_no_torch(tmp_path):
    argv = ["--pretrained_model_name_or_path", EMBEDDED, "--instance_data_dir", ROOT / "instance", "--dry_run"]
    argv += ["--instance_prompt", "a photo of my cat.", "--output_dir", tmp_path / "output", "--resolution", "64"]
    result = run_python(IMPORTED, *argv)
    assert result.stdout.splitlines()[-1] == "exit code 0 imported ['numpy', 'PIL']", result.stderr
    assert "no GPU: training on the CPU" in result.stdout
