"""The flags of evaluate.py."""

import pytest

from tests.helpers.script import run_python
from utils.errors import UserError
from utils.evaluation.arguments import build_parser, parse_args


def test_defaults_are_the_recipes():
    args = build_parser().parse_args([])
    assert args.only is None and args.prompt is None
    assert (args.num_images, args.num_inference_steps, args.guidance_scale) == (4, 50, 7.5)
    assert (str(args.finetuned_model_name_or_path), str(args.output_dir)) == ("output", "result")
    assert not args.safety_checker


@pytest.mark.parametrize(
    ("stages", "flags", "unread"),
    [
        (["score", "report"], ["--class_name", "dog", "--identifier", "zwx"], "--identifier (generate), --class_name"),
        (["score"], ["--choose"], "--only score does not read --choose (generate)"),
        (["report"], ["--instance_data_dir", "x"], "report does not read --instance_data_dir (generate and score)"),
        (["generate", "report"], ["--clip_model", "x"], "--clip_model (score)"),
        (["report"], ["--seed", "1", "--dino_model", "x"], "--seed (generate), --dino_model (score)"),
    ],
)
def test_a_flag_that_no_stage_reads_is_refused(stages, flags, unread):
    with pytest.raises(UserError) as refused:
        parse_args([*(f"--only={stage}" for stage in stages), *flags])
    assert unread in str(refused.value)


def test_flags_of_the_stages_that_run_are_taken():
    assert parse_args(["--only=score", "--only=report", "--instance_data_dir=x", "--clip_model=y", "--debug"])
    assert parse_args(["--only=generate", "--seed=1", "--choose", "--output_dir=x", "--concepts_list=y"])


def test_help_and_mistakes_do_not_import_torch():
    code = "import sys, evaluate; from utils.command_line import run_main; "
    code += "print(run_main(evaluate.main, ['--num_images', '0']), 'torch' in sys.modules)"
    assert run_python(code).stdout == "2 False\n"
