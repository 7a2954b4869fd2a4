"""Commands of diffusers' and ColossalAI's documentation, with their paths changed: each runs, or ends in one line.

The commands are lists of flags as those scripts' READMEs and .sh files have them (diffusers 2026-08,
ColossalAI 2026-04); what a launcher takes is left out.
"""

import json
import shlex
from pathlib import Path

import pytest

from tests.helpers.script import EMBEDDED, ROOT, complaint
from train_dreambooth_colossalai import main
from utils.arguments import parse_args, parse_command_line, training_parser
from utils.command_line import run_main
from utils.errors import UserError
from utils.flags_of_others import NOT_NEEDED, REFUSED, SOME_VALUES, SWITCHES

REQUIRED = ["--pretrained_model_name_or_path=base", "--instance_data_dir=photos", "--instance_prompt=a photo"]
MODEL, PHOTOS, OUTPUT, CLASSES = (f"{{{name}}}" for name in ("model", "photos", "output", "classes"))
START = [
    *("--pretrained_model_name_or_path", MODEL, "--instance_data_dir", PHOTOS, "--output_dir", OUTPUT),
    *("--instance_prompt", "a photo of sks dog", "--resolution", "64"),
]
DIFFUSERS_PRIOR = [
    *("--class_data_dir", CLASSES, "--with_prior_preservation", "--prior_loss_weight=1.0"),
    *("--class_prompt=a photo of dog", "--num_class_images=200", "--max_train_steps=800"),
]
COLOSSALAI_PRIOR = ["--with_prior_preservation", "--class_prompt=a photo of a dog", f"--class_data_dir={CLASSES}"]
SCHEDULE = ["--learning_rate=5e-6", "--lr_scheduler=constant", "--lr_warmup_steps=0"]
HUB = "--push_to_hub is not here: nothing is uploaded from here"
# What follows START, and what the refusal says; None: it runs.
COMMANDS = {
    "diffusers, basic": (
        "--train_batch_size=1 --gradient_accumulation_steps=1 SCHEDULE --max_train_steps=400",
        None,
    ),
    "diffusers, basic, uploaded": (
        "--train_batch_size=1 SCHEDULE --max_train_steps=400 --push_to_hub",
        HUB,
    ),
    "diffusers, prior preservation": ("DIFFUSERS_PRIOR --train_batch_size=1 SCHEDULE", None),
    "diffusers, 16 GB": (
        "DIFFUSERS_PRIOR --train_batch_size=1 --gradient_accumulation_steps=2 --gradient_checkpointing "
        "--use_8bit_adam SCHEDULE",
        None,
    ),
    "diffusers, 12 GB": (
        "DIFFUSERS_PRIOR --train_batch_size=1 --gradient_accumulation_steps=1 --gradient_checkpointing "
        "--use_8bit_adam --enable_xformers_memory_efficient_attention --set_grads_to_none --learning_rate=2e-6 "
        "--lr_scheduler=constant --lr_warmup_steps=0",
        None,
    ),
    "diffusers, 8 GB": (
        "DIFFUSERS_PRIOR --train_batch_size=1 --sample_batch_size=1 --gradient_accumulation_steps=1 "
        "--gradient_checkpointing SCHEDULE --mixed_precision=fp16",
        None,
    ),
    "diffusers, text encoder": (
        "DIFFUSERS_PRIOR --train_text_encoder --train_batch_size=1 --use_8bit_adam SCHEDULE",
        "--train_text_encoder is not here: the text encoder stays as it is",
    ),
    "diffusers, LoRA": (
        "--train_batch_size=1 --checkpointing_steps=100 --learning_rate=1e-4 --report_to=wandb "
        "--lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=500 '--validation_prompt=A photo of sks dog "
        "in a bucket' --validation_epochs=50 --seed=0 --push_to_hub",
        "--validation_epochs is not here: --validation_steps N says",
    ),
    "diffusers, IF": (
        "--train_batch_size=4 --learning_rate=5e-6 --scale_lr --max_train_steps=1200 '--validation_prompt=a sks "
        "dog' --validation_steps=25 --checkpointing_steps=100 --pre_compute_text_embeddings "
        "--tokenizer_max_length=77 --text_encoder_use_attention_mask",
        "--text_encoder_use_attention_mask is not here: it is for DeepFloyd IF",
    ),
    "ColossalAI, README": (
        "--train_batch_size=1 SCHEDULE --max_train_steps=400 --placement=cuda",
        None,
    ),
    "ColossalAI, README, prior preservation": (
        "COLOSSALAI_PRIOR --num_class_images=200 --max_train_steps=800 --placement=cuda SCHEDULE",
        None,
    ),
    "ColossalAI, colossalai.sh": (
        "COLOSSALAI_PRIOR --test_run=True --num_class_images=200 --prior_loss_weight=1.0 --train_batch_size=1 "
        "--learning_rate=5e-6 --placement=auto --plugin=gemini",
        "--test_run is not here: --dry_run only checks",
    ),
    "ColossalAI, colossalai.sh, without its test": (
        "--train_batch_size=1 --max_train_steps=10 --plugin=gemini --placement=auto",
        "argument --plugin/-p: gemini is not here: TorchDDP is the only plugin",
    ),
    "ColossalAI, dreambooth.sh": (
        "COLOSSALAI_PRIOR --num_class_images=200 --prior_loss_weight=1.0 --train_batch_size=1 "
        "--gradient_accumulation_steps=1 --use_8bit_adam SCHEDULE --max_train_steps=800",
        None,
    ),
    "ColossalAI, LoRA": (
        "--train_batch_size=1 --save_steps=50 -p torch_ddp_fp16 --max_train_steps=10",
        None,
    ),
}


def paste(command: str, tmp_path: Path, *more: str) -> list[str]:
    words = dict(DIFFUSERS_PRIOR=DIFFUSERS_PRIOR, COLOSSALAI_PRIOR=COLOSSALAI_PRIOR, SCHEDULE=SCHEDULE)
    command = [*START, *(flag for word in shlex.split(command) for flag in words.get(word, [word]))]
    places = dict(model=EMBEDDED, photos=ROOT / "instance", output=tmp_path / "output", classes=tmp_path / "classes")
    return [word.format(**places) for word in command] + list(more)


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
    command = COMMANDS["ColossalAI, LoRA"][0].replace("--max_train_steps=10", "")
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
