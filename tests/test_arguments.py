"""The command line: what it reads, and its complaints in one line (tests/end_to_end/test_readme.py: which flags)."""

from pathlib import Path

import pytest

from tests.helpers.script import REQUIRED, complaint, run
from utils.arguments import parse_args, training_parser
from utils.errors import UserError


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", "--instance_data_dir", "--instance_prompt"])
def test_required_flags(flag):
    place = REQUIRED.index(flag)
    with pytest.raises(UserError, match=f"required: {flag}$"):
        parse_args(REQUIRED[:place] + REQUIRED[place + 2 :])


BAD_VALUES = {  # what is said: the flags
    "0 is not a finite number of at least 1": "--resolution=0",
    "'51.2' is not a whole number": "--resolution=51.2",
    "'big' is not a whole number": "--resolution=big",
    "'' is not a whole number": "--resolution=",
    "at least 1": (
        "--train_batch_size=0 --num_train_epochs=0 --max_train_steps=0 --gradient_accumulation_steps=0 "
        "--lr_num_cycles=0 --checkpointing_steps=0 --checkpoints_total_limit=0 --max_nonfinite_steps=0 "
        "--num_class_images=0 --sample_batch_size=0"
    ),
    "-1 is not a finite number of at least 1": "--train_batch_size=-1",
    "at least 0": (
        "--lr_warmup_steps=-1 --seed=-1 --adam_beta2=-0.1 --adam_weight_decay=-1 --max_grad_norm=-1 "
        "--prior_loss_weight=-1 --noise_offset=-0.1"
    ),
    "4294967296 is not below 2**32": "--seed=4294967296",
    "'1.5' is not a whole number": "--seed=1.5",
    "0 is not above 0": "--learning_rate=0 --lr_power=0 --adam_epsilon=0 --snr_gamma=0",
    "'fast' is not a number": "--learning_rate=fast",
    "nan is not a finite number": "--learning_rate=nan",
    "inf is not a finite number": "--learning_rate=inf",
    "1e999 is not a finite number": "--learning_rate=1e999",
    "1 is not below 1": "--adam_beta1=1",
    "1.0 is not below 1": "--adam_beta2=1.0",
    "invalid choice: 'fp8'": "--mixed_precision=fp8",
    "invalid choice: 'warm'": "--lr_scheduler=warm",
    "invalid choice: 'bf16'": "--save_dtype=bf16",
    "invalid choice: 'pth'": "--save_format=pth",
    "invalid choice: 'int8'": "--prior_generation_precision=int8",
}


@pytest.mark.parametrize("message", BAD_VALUES)
def test_a_bad_value_is_named_with_its_flag(message):
    for given in BAD_VALUES[message].split():
        said = complaint(given)
        assert said.startswith(f"argument {given.partition('=')[0]}: ") and message in said
    assert "is not below 2**32" in complaint(f"--seed=1{'0' * 400}")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--seed", "4294967295"), ("--adam_beta1", "0"), ("--max_grad_norm", "0"), ("--learning_rate", "1.0e-6")],
)
def test_the_bounds_themselves_are_good(flag, value):
    args = parse_args([*REQUIRED, flag, value])
    assert getattr(args, flag[2:]) == float(value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--with_prior_preservation"], "--with_prior_preservation needs --class_data_dir and --class_prompt"),
        (["--with_prior_preservation", "--class_prompt=a cat"], "--with_prior_preservation needs --class_data_dir"),
        (["--with_prior_preservation", "--class_data_dir=c"], "--with_prior_preservation needs --class_prompt"),
        (["--class_prompt=a cat"], "--class_prompt has no effect without --with_prior_preservation"),
        (["--class_data_dir=c"], "--class_data_dir has no effect without --with_prior_preservation"),
        (["--with_prior_preservation", "--class_data_dir=c", "--class_prompt= "], "argument --class_prompt: is empty"),
        (["--concepts_list=c.json"], "--concepts_list and --instance_data_dir say the same twice"),
        (
            ["--resume_from_checkpoint=latest", "--overwrite_output_dir"],
            "--resume_from_checkpoint continues a run, --overwrite_output_dir starts over",
        ),
    ],
)
def test_flags_that_do_not_fit_together(flags, message):
    assert complaint(*flags).startswith(message)


@pytest.mark.parametrize("folder", ["/var/log", "..", "logs/../../base"])
def test_the_logs_stay_inside_the_output(folder):
    assert f"--logging_dir {folder} is not inside --output_dir" in complaint("--logging_dir", folder)


def test_every_flag_has_its_line_of_help():
    help_text = training_parser().format_help()
    assert all(f"--{name}" in help_text for name in vars(parse_args(REQUIRED)))
    assert all(action.help for action in training_parser().flags.values())


def test_every_name_that_a_run_writes_is_reserved(flags, tmp_path):
    """Not a list by hand: what a run with everything in it leaves in its output folder."""
    more = dict(validation_prompt="a cat", validation_inference_steps=1, validation_steps=2, num_validation_images=1)
    run(flags, max_train_steps=2, checkpointing_steps=2, report_to="tensorboard", **more)
    names = {path.name for path in Path(flags["output_dir"]).iterdir()} - {"logs"}
    assert {"validation.jsonl", "validation", "metrics.jsonl", "run.json", "checkpoint-2", "unet"} <= names
    for name in (*names, "run.json.previous", ".assembling-x", "UNet", "vae/logs"):
        assert f"--logging_dir {name} is a part of the result" in complaint("--logging_dir", name)
