"""Several subjects of one model: each is evaluated with its own photos and prompt, and then all are averaged."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.concepts import read_list
from utils.errors import UserError
from utils.evaluation import intervals
from utils.evaluation.prompts import slug
from utils.evaluation.samples import BASELINE, FINETUNED, SAMPLES_FILE
from utils.files.json_files import read_json_or_none, write_json
from utils.files.ownership import run_of

SUBJECTS_FILE = "subjects.json"
MEANS = ("dino", "clip_i", "clip_t", "clip_t_other")  # over subjects
ONE_SUBJECT = ("prompt", "prompts_file", "dreambench", "instance_data_dir", "identifier", "class_name")


class Mean(NamedTuple):
    """Of a metric over subjects, each subject's own mean counted once."""

    value: float
    interval: list[float] | None
    num_subjects: int


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


def means(measured: Mapping[str, dict], model: str) -> dict[str, Mean]:
    """By metric: the mean of {subject: metrics.json} for a model, with its 95% interval for other subjects like these
    if they are enough for one; a metric that a subject lacks is left out."""
    result = {}
    for metric in MEANS:
        entries = [metrics["models"][model].get(metric, {}) for metrics in measured.values()]
        values = [entry.get("value") for entry in entries]
        if values and None not in values:
            found = intervals.mean_change(np.array(values)[:, None], are_means=True)
            result[metric] = Mean(float(np.mean(values)), [found.low, found.high] if found else None, len(values))
    return result


def write_subjects(output_dir: Path, measured: Mapping[str, dict]) -> None:
    """Writes subjects.json: every subject's means and those over subjects."""
    models = {}
    for model in (BASELINE, FINETUNED):
        found = {name: means({name: metrics}, model) for name, metrics in measured.items()}
        subjects = {name: {key: mean.value for key, mean in own.items()} for name, own in found.items()}
        overall = {key: mean._asdict() for key, mean in means(measured, model).items()}
        models[model] = dict(subjects=subjects, mean=overall)
    write_json(output_dir / SUBJECTS_FILE, dict(written_by="evaluate.py", models=models))
