"""The report's table of metrics: every model beside the photos' own values and the paper's."""

from typing import NamedTuple

from utils.evaluation.metrics import METRICS
from utils.evaluation.report.gallery import label
from utils.evaluation.samples import BASELINE, FINETUNED
from utils.evaluation.wording import number

OF_PHOTOS = {"dino": "real_dino", "clip_i": "real_clip", "clip_t": "clip_t"}


class Cell(NamedTuple):
    """A number, its interval, and the reason if there is no number."""

    text: str
    interval: str = ""
    reason: str | None = None


class MetricRow(NamedTuple):
    name: str
    meaning: str
    cells: list[Cell]


def metric_table(samples: dict, metrics: dict) -> dict:
    """Every metric of every model beside the photos' own value and the paper's; and those that were not computed."""
    models = [BASELINE, FINETUNED, *(name for name in samples["models"] if name not in (BASELINE, FINETUNED))]
    paper = metrics["paper"]
    rows = []
    absent: dict[str, list[str]] = {}
    for key, metric in METRICS.items():
        entries = [metrics["models"][model][key] for model in models]
        if all(entry["value"] is None for entry in entries):
            absent.setdefault(entries[-1]["reason"], []).append(metric.label)
            continue
        change = metrics["changes"][FINETUNED].get(key)
        baseline, finetuned, *checkpoints = map(metric_cell, entries)
        of_photos = metrics["photos"].get(OF_PHOTOS.get(key, ""), {}).get("value")
        cells = [baseline, finetuned, Cell(change["text"] if change else ""), Cell(number(of_photos)), *checkpoints]
        rows.append(
            MetricRow(metric.label, metric.meaning, [*cells, *(Cell(number(p.get(key))) for p in paper.values())])
        )
    columns = [*map(label, models[:2]), "change", "your photos", *map(label, models[2:])]
    columns += [f"paper: {name}" for name in paper]
    return dict(metric_rows=rows, absent_metrics=absent, columns=columns, has_paper=bool(paper))


def metric_cell(entry: dict) -> Cell:
    return Cell("\u2013", reason=entry["reason"]) if entry["value"] is None else Cell(number(entry["value"]))
