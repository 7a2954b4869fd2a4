"""Commands of diffusers' and ColossalAI's documentation, with their paths changed: each runs, or ends in one line.

The commands are lists of flags as those scripts' READMEs and .sh files have them (diffusers 2026-08,
ColossalAI 2026-04); what a launcher takes is left out.
"""

import json
import shlex
from pathlib import Path

import pytest

from tests.helpers.script import EMBEDDED, REQUIRED, ROOT, complaint
from train_dreambooth_colossalai import main
from utils.arguments import parse_args, parse_command_line, training_parser
from utils.command_line import run_main
from utils.errors import UserError
from utils.flags_of_others import NOT_NEEDED, REFUSED, SOME_VALUES, SWITCHES

START = [
    *("--pretrained_model_name_or_path", "{model}", "--instance_data_dir", "{photos}", "--output_dir", "{output}"),
    *("--instance_prompt", "a photo of sks dog", "--resolution", "64"),
]
# What follows START, and what the refusal says; None: it runs. Those of several that differ in flags of ours alone.
COMMANDS = {
    "diffusers, 12 GB": (
        "--class_data_dir={classes} --with_prior_preservation --prior_loss_weight=1.0 '--class_prompt=a photo of dog' "
        "--num_class_images=200 --max_train_steps=800 --train_batch_size=1 --gradient_accumulation_steps=1 "
        "--gradient_checkpointing --use_8bit_adam --enable_xformers_memory_efficient_attention --set_grads_to_none "
        "--learning_rate=2e-6 --lr_scheduler=constant --lr_warmup_steps=0",
        None,
    ),
    "diffusers, LoRA": (
        "--train_batch_size=1 --checkpointing_steps=100 --learning_rate=1e-4 --report_to=wandb "
        "--lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=500 '--validation_prompt=A photo of sks dog "
        "in a bucket' --validation_epochs=50 --seed=0 --push_to_hub",
        "--validation_epochs is not here: --validation_steps N says",
    ),
    "ColossalAI, README": (
        "--train_batch_size=1 --learning_rate=5e-6 --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=400 "
        "--placement=cuda",
        None,
    ),
}


def paste(command: str, tmp_path: Path, *more: str) -> list[str]:
    places = dict(model=EMBEDDED, photos=ROOT / "instance", output=tmp_path / "output", classes=tmp_path / "classes")
    return [word.format(**places) for word in [*START, *shlex.split(command), *more]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_pasted_command(name, tmp_path, capsys):
    command, refusal = COMMANDS[name]
    code = run_main(main, paste(command, tmp_path, "--dry_run"))
    out, err = capsys.readouterr()
    if refusal is None:
        assert code == 0 and "ready to train" in out and err == ""
    else:
        assert code == 2 and err.startswith(f"error: {refusal}") and err.count("\n") == 1


def test_one_for_real(tmp_path, capsys):
    command = "--train_batch_size=1 --save_steps=50 -p torch_ddp_fp16"  # ColossalAI's for a LoRA
    more = ["--max_train_steps=2", "--save_steps=1", "--enable_xformers_memory_efficient_attention", "--local_rank=0"]
    assert run_main(main, paste(command, tmp_path, *more, "--mixed_precision=no", "--lr_warmup_steps=0")) == 0
    out = capsys.readouterr().out
    (note,) = [line for line in out.splitlines() if line.startswith("note  flag")]
    assert note.endswith(": --enable_xformers_memory_efficient_attention, --local_rank, --plugin")
    assert (tmp_path / "output/checkpoint-1").is_dir()
    recorded = json.loads((tmp_path / "output/run.json").read_text())["arguments"]
    assert not recorded.keys() & set(NOT_NEEDED) and recorded["checkpointing_steps"] == 1


def test_none_of_them_is_a_flag_of_ours():
    ours = {action.dest for action in training_parser().flags.values()} - set(NOT_NEEDED)
    assert not ours & {*NOT_NEEDED, *REFUSED} and not set(NOT_NEEDED) & REFUSED.keys()


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_what_is_not_needed_is_noted(name):
    values, instead = SOME_VALUES.get(name, (["0"], ""))
    given = f"--{name}" if name in SWITCHES else f"--{name}={values[0]}"
    args, _, notes = parse_command_line([*REQUIRED, given])
    assert notes == [f"not needed here, without effect: --{name}"] and vars(args) == vars(parse_args(REQUIRED))
    if instead:
        assert complaint(f"--{name}=other").endswith(f"other is not here: {instead}")
    assert f"--{name}" not in training_parser().format_help()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name):
    for words in ([f"--{name}"], [f"--{name}=1"], [f"--{name}", "1", "--learning_rate=wrong"]):
        assert complaint(*words) == f"--{name} is not here: {REFUSED[name]}"


def test_several_refused_flags_are_one_line():
    said = complaint("--push_to_hub", "--hub_model_id=x", "--train_text_encoder")
    assert said == (
        f"--push_to_hub, --hub_model_id is not here: {REFUSED['push_to_hub']}; "
        f"--train_text_encoder is not here: {REFUSED['train_text_encoder']}"
    )


def test_a_configuration_with_flags_of_others(tmp_path):
    config = tmp_path / "run.json"
    config.write_text('{"save_steps": 3, "set_grads_to_none": true, "allow_tf32": false, "variant": "fp16"}')
    args, _, notes = parse_command_line([*REQUIRED, f"--config={config}"])
    assert args.checkpointing_steps == 3
    assert notes == ["not needed here, without effect: --set_grads_to_none, --variant"]
    config.write_text('{"push_to_hub": true}')
    with pytest.raises(UserError, match="--push_to_hub is not here: nothing is uploaded"):
        parse_args([*REQUIRED, f"--config={config}"])


def test_other_names_of_our_flags():
    assert parse_args([*REQUIRED, "--save_steps=7"]).checkpointing_steps == 7
    assert parse_args([*REQUIRED, "--offset_noise"]).noise_offset == 0.1


def test_report_to():
    args, _, notes = parse_command_line([*REQUIRED, "--report_to=all"])
    assert args.report_to == "tensorboard" and notes == ["--report_to all is tensorboard here, beside metrics.jsonl"]
    assert "wandb sync --sync-tensorboard" in complaint("--report_to=wandb")
    assert complaint("--report_to=comet_ml") == "argument --report_to: comet_ml is not here: none, or tensorboard"
