"""Several subjects of one model: each is evaluated with its own photos and prompt, and then all are averaged."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.concepts import read_list
from utils.errors import UserError
from utils.evaluation import intervals
from utils.evaluation.metrics import METRICS
from utils.evaluation.prompts import slug
from utils.evaluation.samples import BASELINE, FINETUNED, SAMPLES_FILE
from utils.evaluation.wording import number
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


def mean_over_subjects(values: list[float]) -> Mean:
    """The mean of subjects' means, and its 95% interval for other subjects like these; None for fewer than 25."""
    found = intervals.mean_change(np.array(values)[:, None], are_means=True)
    return Mean(float(np.mean(values)), [found.low, found.high] if found else None, len(values))


def means(measured: Mapping[str, dict], model: str) -> dict[str, Mean]:
    """By metric: the mean of {subject: metrics.json} for a model; a metric that a subject lacks is left out."""
    result = {}
    for metric in MEANS:
        values = [metrics["models"][model].get(metric, {}).get("value") for metrics in measured.values()]
        if values and None not in values:
            result[metric] = mean_over_subjects(values)
    return result


def write_subjects(output_dir: Path, measured: Mapping[str, dict]) -> list[str]:
    """Writes subjects.json: every subject's means and those over subjects; returns lines for the terminal."""
    lines, models = [], {}
    for model in (BASELINE, FINETUNED):
        per_subject = {name: means({name: metrics}, model) for name, metrics in measured.items()}
        overall = means(measured, model)
        for name, found in [*per_subject.items(), (f"mean of {len(measured)} subjects", overall)]:
            cells = [f"{METRICS[metric].label} {number(mean.value)}" for metric, mean in found.items()]
            lines.append(f"{name}, {model}: {', '.join(cells) or 'nothing was measured'}")
        models[model] = dict(
            subjects={name: {key: mean.value for key, mean in found.items()} for name, found in per_subject.items()},
            mean={key: mean._asdict() for key, mean in overall.items()},
        )
    write_json(output_dir / SUBJECTS_FILE, dict(written_by="evaluate.py", models=models))
    return lines
