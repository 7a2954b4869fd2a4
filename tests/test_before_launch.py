"""What run.sh checks before torchrun: silent if all is well, else one line."""

import pytest

from tests.helpers.script import as_argv, run_python
from utils import before_launch
from utils.command_line import run_main

EVALUATION = ["--num_images=1"]


def check(flags: dict, evaluation: list[str] = EVALUATION, evaluated: object = None) -> int:
    evaluation = [*evaluation, f"--finetuned_model_name_or_path={evaluated or flags['output_dir']}"]
    return run_main(before_launch.check, [*as_argv(flags), "--", *evaluation])


def test_silent_if_all_is_well(flags, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert check(flags) == 0
    assert tuple(capsys.readouterr()) == ("", "") and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "evaluation", "said"),
    [
        (dict(learning_rate="x"), EVALUATION, "argument --learning_rate: "),
        (dict(no_such_flag=1), EVALUATION, "unrecognized arguments: --no_such_flag=1"),
        (dict(pretrained_model_name_or_path="missing"), EVALUATION, "missing"),
        (dict(instance_data_dir="missing"), EVALUATION, "missing"),
        (dict(resolution=33), EVALUATION, "--resolution 33 is not divisible"),
        ({}, ["--num_images=x"], "argument --num_images: "),
    ],
)
def test_a_mistake_is_one_line(flags, changes, evaluation, said, capsys):
    assert check(flags | changes, evaluation) == 2
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
