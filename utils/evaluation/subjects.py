"""Several subjects of one model: each is evaluated with its own photos and prompt."""

import argparse
from pathlib import Path

from utils.concepts import read_list
from utils.errors import UserError
from utils.evaluation.prompts import slug
from utils.evaluation.samples import SAMPLES_FILE
from utils.files.json_files import read_json_or_none
from utils.files.ownership import run_of

ONE_SUBJECT = ("prompt", "prompts_file", "dreambench", "instance_data_dir", "identifier", "class_name")


def split_by_subject(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of one evaluation a subject, each in a folder of its own; `args` alone if there is no list.

    The list is that of --concepts_list, or the one that the fine-tuned run.json names if no subject was given. If
    nothing is drawn, the folders are those that were drawn into.
    """
    given = [flag for flag in ONE_SUBJECT if getattr(args, flag)]
    path = args.concepts_list
    if path is None and "generate" not in args.stages:
        return [argparse.Namespace(**vars(args) | dict(output_dir=folder)) for folder in drawn_last(args.output_dir)]
    if path is None and not given:
        recorded = run_of(args.finetuned_model_name_or_path).get("arguments") or {}
        named = recorded.get("concepts_list")
        path = Path(named) if named and Path(named).is_file() else None
    if path is None:
        return [args]
    if given or args.choose:
        flag = given[0] if given else "choose"
        raise UserError(f"--concepts_list names several subjects, and --{flag} is for one: leave one of them out")
    changes = [
        dict(
            concept=concept,
            prompt=[concept.instance_prompt],
            instance_data_dir=concept.instance_data_dir,
            output_dir=args.output_dir / f"{place:02d}-{slug(concept.instance_prompt)}",
        )
        for place, concept in enumerate(read_list(path), 1)
    ]
    return [argparse.Namespace(**vars(args) | change) for change in changes]


def drawn_last(output_dir: Path) -> list[Path]:
    """The folders of the evaluation that was drawn last into `output_dir`: that folder itself, or one a subject."""
    paths = sorted([*output_dir.glob(SAMPLES_FILE), *output_dir.glob(f"[0-9]*-*/{SAMPLES_FILE}")])
    if not paths:
        return [output_dir]
    command = {path: (read_json_or_none(path) or {}).get("command") for path in paths}
    last = max(paths, key=lambda path: path.stat().st_mtime_ns)
    return [path.parent for path in paths if command[path] == command[last]]
