"""What an evaluation samples: its arguments filled in from run.json and checked."""

import argparse
import math
import os
from pathlib import Path

from utils.errors import UserError
from utils.evaluation.arguments import BASELINE_FLAG, FINETUNED_FLAG, check_text
from utils.evaluation.prompts import (
    dreambench_prompts,
    guess_subject,
    number_prompts,
    other_prompts,
    read_prompts_file,
)
from utils.evaluation.samples import (
    COMPARISON_FILE,
    METRICS_CSV,
    METRICS_JSON,
    REPORT_FILE,
    check_writable,
    plan_samples,
)
from utils.files.json_files import read_json
from utils.files.ownership import RUN_FILE
from utils.models.check import check_is_folder, check_pipeline
from utils.models.folder import MODEL_INDEX
from utils.run.lineage import lineage_of, list_checkpoints


def check(args: argparse.Namespace) -> list[str]:
    """Fills `args` from run.json, checks folders and sizes, and returns notes for the user. Raises UserError."""
    notes = check_generate(args) if "generate" in args.stages else []
    if args.instance_data_dir is not None:
        check_is_folder(
            args.instance_data_dir, "--instance_data_dir", "name the folder of your photos, or leave it out"
        )
    for flag in ("clip_model", "dino_model"):
        if getattr(args, flag) is not None:
            check_is_folder(getattr(args, flag), f"--{flag}", "name the folder of such a model, or leave it out")
    check_output_dir(args)
    return notes


def check_generate(args: argparse.Namespace) -> list[str]:
    """The checks that making images needs; sets args.prompts."""
    check_is_folder(args.finetuned_model_name_or_path, FINETUNED_FLAG, "train first (run.sh), or name another folder")
    check_pipeline(args.finetuned_model_name_or_path, FINETUNED_FLAG, safety_checker=args.safety_checker)
    notes = fill_from_run_json(args)
    check_pipeline(args.pretrained_model_name_or_path, BASELINE_FLAG, safety_checker=args.safety_checker)
    if args.pretrained_model_name_or_path.samefile(args.finetuned_model_name_or_path):
        notes.append(f"warning: {BASELINE_FLAG} and {FINETUNED_FLAG} are the same folder: both rows will be the same")
    args.checkpoint, checkpoint_notes = find_checkpoints(args.finetuned_model_name_or_path, args.checkpoint or [])
    notes += checkpoint_notes
    args.prompts = number_prompts(args.prompt, args.class_name, args.drift_prompt)
    set_image_size(args)
    check_steps(args)
    return notes


def find_checkpoints(folder: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """Names of the wanted checkpoint folders, by step, and notes. Raises UserError if one is not there.

    "all" are those of the run that run.json records: a folder may also hold what another run left behind.
    """
    run_file = folder / RUN_FILE
    lineage = lineage_of(read_json(run_file)) if run_file.is_file() else None
    whole = {checkpoint.path.name for checkpoint in list_checkpoints(folder)}
    own = {checkpoint.path.name for checkpoint in list_checkpoints(folder, lineage)}
    wanted, notes = set(), []
    for name in names:
        name = f"checkpoint-{name}" if name.isdecimal() else name
        if name == "all":
            wanted |= own
        elif name in whole:
            wanted.add(name)
            if name not in own:
                notes.append(f"note: {folder / name} is of another run than {run_file} records")
        else:
            found = ", ".join(sorted(whole, key=step_of)) or "none"
            raise UserError(f"--checkpoint {name}: {folder} holds no whole {name} (it holds: {found})")
    if names and not wanted:
        raise UserError(f"--checkpoint all: {folder} holds no checkpoint of its run: leave the flag out")
    return sorted(wanted, key=step_of), notes


def step_of(checkpoint: str) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.rpartition("-")[2])


def fill_from_run_json(args: argparse.Namespace) -> list[str]:
    """Takes what was not given from the fine-tuned folder's run.json; returns one note a value taken."""
    path = args.finetuned_model_name_or_path / RUN_FILE
    run = read_json(path) if path.is_file() else {}
    recorded = run.get("arguments")
    recorded = recorded if isinstance(recorded, dict) else {}
    notes = []
    if run.get("status") == "running" and (path.parent / MODEL_INDEX).is_file():
        notes.append(f"warning: {path} says that training has not finished: {path.parent} holds an earlier result")
    for flag, key, kind in (
        ("pretrained_model_name_or_path", "pretrained_model_name_or_path", Path),
        ("instance_data_dir", "instance_data_dir", Path),
    ):
        value = recorded.get(key)
        if getattr(args, flag) is not None or not isinstance(value, str) or not value:
            continue
        if flag == "instance_data_dir" and not Path(value).is_dir():
            notes.append(f"warning: the photos that {path} names are not at {value}: comparison.png shows none")
            continue
        if flag == "pretrained_model_name_or_path" and not Path(value).is_dir():
            raise UserError(f"the baseline that {path} names is not at {value} (seen from here): give {BASELINE_FLAG}")
        setattr(args, flag, kind(value))
        notes.append(f'from {path}: --{flag} "{value}"')
    if args.pretrained_model_name_or_path is None:
        raise UserError(f"--pretrained_model_name_or_path is missing, and {path} does not record one: give it")
    instance_prompt = recorded.get("instance_prompt")
    return notes + fill_prompts(args, instance_prompt if isinstance(instance_prompt, str) else "", path)


def fill_prompts(args: argparse.Namespace, instance_prompt: str, run_file: Path) -> list[str]:
    """Sets args.prompt and args.drift_prompt to all wanted prompts, and the class and the identifier where guessed."""
    notes = []
    prompts = list(args.prompt or [])
    prompts += read_prompts_file(args.prompts_file) if args.prompts_file else []
    prompts += dreambench_prompts(args.dreambench, args.identifier, args.class_name) if args.dreambench else []
    if not prompts and not instance_prompt:
        raise UserError(f"--prompt is missing, and {run_file} does not record one: give it")
    if not prompts:
        check_text(f"instance_prompt in {run_file}", instance_prompt)
        prompts = [instance_prompt]
        notes.append(f'from {run_file}: --prompt "{instance_prompt}"')
    args.prompt = list(dict.fromkeys(prompts))
    for flag, guess in zip(("class_name", "identifier"), guess_subject(instance_prompt or prompts[0]), strict=True):
        if getattr(args, flag) is None and guess:
            setattr(args, flag, guess)
            notes.append(f'from the prompt "{instance_prompt or prompts[0]}": --{flag} "{guess}"')
    if args.num_drift_images and args.drift_prompt is None:
        args.drift_prompt = other_prompts(args.class_name) if args.class_name else []
    args.drift_prompt = args.drift_prompt or []
    return notes


def set_image_size(args: argparse.Namespace) -> None:
    """Sets --height and --width to the baseline's own where not given, and checks that the VAEs can make them."""
    for folder in (args.pretrained_model_name_or_path, args.finetuned_model_name_or_path):
        factor = vae_scale_factor(folder)
        sample_size = read_json(folder / "unet" / "config.json").get("sample_size") or 64
        height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
        args.height = args.height or height * factor
        args.width = args.width or width * factor
        multiple = math.lcm(8, factor)  # diffusers wants a multiple of 8 whatever the VAE
        for flag in ("height", "width"):
            value = getattr(args, flag)
            if value % multiple:
                near = max(multiple, round(value / multiple) * multiple)
                raise UserError(f"--{flag} is {value}: give a multiple of {multiple}, such as {near}")


def vae_scale_factor(folder: Path) -> int:
    """Pixels a latent cell is wide and high."""
    blocks = read_json(folder / "vae" / "config.json").get("block_out_channels") or [0]
    return 2 ** (len(blocks) - 1)


def check_steps(args: argparse.Namespace) -> None:
    """Checks that the schedulers have as many timesteps as --num_inference_steps asks for."""
    for folder in (args.pretrained_model_name_or_path, args.finetuned_model_name_or_path):
        most = read_json(folder / "scheduler" / "scheduler_config.json").get("num_train_timesteps", 1000)
        if args.num_inference_steps > most:
            raise UserError(
                f"--num_inference_steps is {args.num_inference_steps}: {folder} has {most} timesteps at most"
            )


def check_output_dir(args: argparse.Namespace) -> None:
    """Checks that writing the results touches no file that evaluate.py did not write. Raises UserError."""
    output_dir = args.output_dir
    resolved = output_dir.resolve()
    for flag in ("pretrained_model_name_or_path", "finetuned_model_name_or_path", "instance_data_dir"):
        folder = getattr(args, flag)
        if folder is not None and (resolved == folder.resolve() or folder.resolve() in resolved.parents):
            raise UserError(f"--output_dir {output_dir} is --{flag} or inside it: name a folder of its own")
    existing = next(path for path in (resolved, *resolved.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir {output_dir}: {existing} is a file: name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output_dir}: no permission to write in {existing}: name another folder")
    names = [METRICS_JSON, METRICS_CSV] if "score" in args.stages else []
    names += [REPORT_FILE] if "report" in args.stages else []
    if "generate" in args.stages:
        names += [*(sample.file for sample in plan_samples(args, args.prompts)), COMPARISON_FILE]
    check_writable(output_dir, names)
