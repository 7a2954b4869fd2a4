"""What an evaluation's flags leave open: filled in from the fine-tuned folder's run.json, and from the prompts."""

import argparse
from collections import Counter
from pathlib import Path

from utils.errors import UserError
from utils.evaluation.arguments import BASELINE_FLAG
from utils.evaluation.prompts import (
    Subject,
    class_in,
    dreambench_prompts,
    other_prompts,
    read_subject,
)
from utils.files.ownership import RUN_FILE, prompts_of, run_of
from utils.models.base import from_hub_cache
from utils.models.folder import MODEL_INDEX
from utils.values import as_text, read_prompts

Notes = list[tuple[str, str]]  # ("note" or "warning", what is said)


def fill_from_run_json(args: argparse.Namespace) -> Notes:
    """Takes what was not given from the fine-tuned folder's run.json; returns notes, one on all that was taken."""
    path = args.finetuned_model_name_or_path / RUN_FILE
    run = dict(arguments={}) | run_of(path.parent)
    recorded = run["arguments"]
    notes: Notes = []
    taken = []
    if run.get("status") == "running" and (path.parent / MODEL_INDEX).is_file():
        notes.append(("warning", f"{path} says that training has not finished: {path.parent} holds an earlier result"))
    for flag in ("pretrained_model_name_or_path", "pretrained_vae_name_or_path", "instance_data_dir"):
        value = recorded.get(flag)
        if getattr(args, flag) is not None or not isinstance(value, str) or not value:
            continue
        if flag == "instance_data_dir" and not Path(value).is_dir():
            notes.append(("warning", f"the photos that {path} names are not at {value}: comparison.png shows none"))
            continue
        if flag != "instance_data_dir" and not from_hub_cache(Path(value)).exists():
            what = "baseline" if flag == BASELINE_FLAG[2:] else "VAE"
            raise UserError(f"the {what} that {path} names is not at {value} (seen from here): give --{flag}")
        setattr(args, flag, Path(value))
        taken.append(f'--{flag} "{value}"')
    if args.pretrained_model_name_or_path is None:
        raise UserError(f"--pretrained_model_name_or_path is missing, and {path} does not record one: give it")
    instance_prompt = recorded.get("instance_prompt")
    taken += fill_prompts(args, instance_prompt if isinstance(instance_prompt, str) else "", path)
    notes += [("note", f"from {path}: {' '.join(taken)}")] if taken else []
    notes += fill_subject(args, run)
    if args.drift_prompt is None:
        args.drift_prompt = other_prompts(args.class_name) if args.num_drift_images and args.class_name else []
    return notes


def own_prompts(run: dict, folder: Path | None, *, is_one_of_several: bool) -> list[str]:
    """The prompts that run.json says this subject's photos were trained with, one a photo; none if it was not there.

    The photos are those of the folder. If it is the evaluation's only subject and the run's, they may be elsewhere
    now, or others.
    """
    trained_in = run["arguments"].get("instance_data_dir") or ""
    by_folder: dict[Path, list[dict]] = {}
    for photo in (photo for photo in run.get("photos") or [{}] if isinstance(photo, dict)):
        by_folder.setdefault(Path(photo.get("folder") or trained_in).resolve(), []).append(photo)
    if is_one_of_several or len(by_folder) > 1:
        photos = by_folder.get(folder.resolve(), []) if folder is not None else []
        run = run | dict(photos=photos) if photos else {}
    return list(Counter(prompts_of(run)).elements())


def fill_subject(args: argparse.Namespace, run: dict) -> Notes:
    """Sets the class and the identifier that were not given, by the prompts; returns notes on what was taken."""
    concept = args.concept
    trained_with = own_prompts(run, args.instance_data_dir, is_one_of_several=concept is not None)
    prompts = trained_with or args.prompt
    class_prompts = [concept and concept.class_prompt]
    class_prompts += [run["arguments"].get("class_prompt")] if trained_with else []
    classes = [args.class_name, *(class_in(prompt) for prompt in class_prompts if isinstance(prompt, str))]
    subject = read_subject(prompts, next((name for name in classes if name), None))
    notes: Notes = []
    found = []
    for flag in Subject._fields:
        told = getattr(subject, flag)
        if told and getattr(args, flag) is None:
            setattr(args, flag, told)
            found.append(f'--{flag} "{told}"')
    if found:
        how = "these flags correct it"
        how += ", beside --prompt and --instance_data_dir of this subject" if concept else ""
        notes.append(("note", f'read from the prompt "{prompts[0]}": {" ".join(found)} ({how})'))
    if args.class_name is None:
        how = 'a "class_prompt" in --concepts_list' if concept else "--class_name"
        notes.append(("note", f'no class in the prompt "{prompts[0]}": say what the subject is one of by {how}'))
    return notes


def fill_prompts(args: argparse.Namespace, instance_prompt: str, run_file: Path) -> list[str]:
    """Sets args.prompt to all wanted prompts of the subject; returns what it took from run.json, if anything."""
    taken = []
    prompts = list(args.prompt or [])
    prompts += read_prompts(args.prompts_file, f"--prompts_file {args.prompts_file}") if args.prompts_file else []
    prompts += dreambench_prompts(args.dreambench, args.identifier, args.class_name) if args.dreambench else []
    if not prompts and not instance_prompt:
        raise UserError(f"--prompt is missing, and {run_file} does not record one: give it")
    if not prompts:
        prompts = [as_text(instance_prompt, f"instance_prompt in {run_file} ")]
        taken = [f'--prompt "{instance_prompt}"']
    args.prompt = list(dict.fromkeys(prompts))
    return taken
