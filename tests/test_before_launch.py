"""What run.sh checks before torchrun: silent if all is well, else one line."""

import pytest

from tests.helpers.script import as_argv, run_python
from utils import before_launch
from utils.command_line import run_main


def check(flags: dict, evaluated: object = None) -> int:
    evaluation = ["--num_images=1", f"--finetuned_model_name_or_path={evaluated or flags['output_dir']}"]
    return run_main(before_launch.check, [*as_argv(flags), "--", *evaluation])


def test_silent_if_all_is_well(flags, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert check(flags) == 0
    assert tuple(capsys.readouterr()) == ("", "") and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(pretrained_model_name_or_path="missing"), "missing"),
        (dict(resolution=33), "--resolution 33 is not divisible"),
    ],
)
def test_a_mistake_is_one_line(flags, changes, said, capsys):
    """Of either command line: tests/end_to_end/test_setup.py."""
    assert check(flags | changes) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_what_is_trained_is_what_is_evaluated(flags, capsys, tmp_path):
    assert check(flags, evaluated=tmp_path / "earlier") == 2
    assert f"{tmp_path / 'earlier'} is evaluated: set OUTPUT_DIR instead" in capsys.readouterr().err


def test_torch_is_not_imported(flags):
    code = "import sys; from utils.before_launch import main; code = main()"
    code += "; assert code == 0 and 'torch' not in sys.modules"
    result = run_python(code, *as_argv(flags))
    assert result.returncode == 0, result.stderr
