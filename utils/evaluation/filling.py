"""What an evaluation's flags leave open: filled in from the fine-tuned folder's run.json, and from the prompts."""

import argparse
from pathlib import Path

from utils.errors import UserError
from utils.evaluation.arguments import BASELINE_FLAG, check_text
from utils.evaluation.prompts import dreambench_prompts, other_prompts, read_prompts_file
from utils.evaluation.subject import Subject, guess_subject
from utils.files.json_files import read_json
from utils.files.ownership import RUN_FILE
from utils.models.base import from_hub_cache
from utils.models.folder import MODEL_INDEX

Notes = list[tuple[str, str]]  # ("note" or "warning", what is said)


def fill_from_run_json(args: argparse.Namespace) -> Notes:
    """Takes what was not given from the fine-tuned folder's run.json; returns one note a value taken."""
    path = args.finetuned_model_name_or_path / RUN_FILE
    run = read_json(path) if path.is_file() else {}
    recorded = run.get("arguments")
    recorded = recorded if isinstance(recorded, dict) else {}
    notes: Notes = []
    if run.get("status") == "running" and (path.parent / MODEL_INDEX).is_file():
        notes.append(("warning", f"{path} says that training has not finished: {path.parent} holds an earlier result"))
    for flag, key, kind in (
        ("pretrained_model_name_or_path", "pretrained_model_name_or_path", Path),
        ("pretrained_vae_name_or_path", "pretrained_vae_name_or_path", Path),
        ("instance_data_dir", "instance_data_dir", Path),
    ):
        value = recorded.get(key)
        if getattr(args, flag) is not None or not isinstance(value, str) or not value:
            continue
        if flag == "instance_data_dir" and not Path(value).is_dir():
            notes.append(("warning", f"the photos that {path} names are not at {value}: comparison.png shows none"))
            continue
        if flag != "instance_data_dir" and not from_hub_cache(Path(value), f"--{flag}").exists():
            what = "baseline" if flag == BASELINE_FLAG[2:] else "VAE"
            raise UserError(f"the {what} that {path} names is not at {value} (seen from here): give --{flag}")
        setattr(args, flag, kind(value))
        notes.append(("note", f'from {path}: --{flag} "{value}"'))
    if args.pretrained_model_name_or_path is None:
        raise UserError(f"--pretrained_model_name_or_path is missing, and {path} does not record one: give it")
    instance_prompt = recorded.get("instance_prompt")
    notes += fill_prompts(args, instance_prompt if isinstance(instance_prompt, str) else "", path)
    notes += fill_subject(args, photo_prompts(run), recorded.get("class_prompt"))
    if args.num_drift_images and args.drift_prompt is None:
        args.drift_prompt = other_prompts(args.class_name) if args.class_name else []
    args.drift_prompt = args.drift_prompt or []
    return notes


def photo_prompts(run: dict) -> list[str]:
    """The prompts that run.json says its photos were trained with: captions, else --instance_prompt."""
    instance_prompt = (run.get("arguments") or {}).get("instance_prompt")
    photos = run.get("photos")
    prompts = [photo.get("prompt", instance_prompt) for photo in photos or [{}] if isinstance(photo, dict)]
    return [prompt for prompt in prompts if isinstance(prompt, str) and prompt]


def fill_subject(args: argparse.Namespace, trained_with: list[str], class_prompt: object) -> Notes:
    """Sets the class and the identifier that were not given, by the prompts; returns notes on what was guessed."""
    given = f"a {args.class_name}" if args.class_name else class_prompt
    prompts = trained_with or args.prompt
    subject = guess_subject(prompts, given if isinstance(given, str) else None)
    notes: Notes = []
    found = []
    for flag in Subject._fields:
        guess = getattr(subject, flag)
        if getattr(args, flag) is None:
            args.guessed.append(flag)
            if guess:
                setattr(args, flag, guess)
                found.append(f'--{flag} "{guess}"')
    if found:
        notes.append(("note", f'read from the prompt "{prompts[0]}": {" ".join(found)} (these flags correct it)'))
    if args.class_name is None:
        notes.append(
            ("note", f'no class in the prompt "{prompts[0]}": say what the subject is one of by --class_name')
        )
    return notes


def fill_prompts(args: argparse.Namespace, instance_prompt: str, run_file: Path) -> Notes:
    """Sets args.prompt to all wanted prompts of the subject."""
    notes: Notes = []
    prompts = list(args.prompt or [])
    prompts += read_prompts_file(args.prompts_file) if args.prompts_file else []
    prompts += dreambench_prompts(args.dreambench, args.identifier, args.class_name) if args.dreambench else []
    if not prompts and not instance_prompt:
        raise UserError(f"--prompt is missing, and {run_file} does not record one: give it")
    if not prompts:
        check_text(f"instance_prompt in {run_file}", instance_prompt)
        prompts = [instance_prompt]
        notes.append(("note", f'from {run_file}: --prompt "{instance_prompt}"'))
    args.prompt = list(dict.fromkeys(prompts))
    return notes
