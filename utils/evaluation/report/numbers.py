"""The report's table of metrics: every model beside the photos' own values and the paper's."""

from typing import NamedTuple

from utils.evaluation.candidates import label
from utils.evaluation.metrics import METRICS
from utils.evaluation.samples import BASELINE, FINETUNED
from utils.evaluation.wording import number

OF_PHOTOS = {"dino": "real_dino", "clip_i": "real_clip"}


class Table(NamedTuple):
    """Columns; rows of (metric, what it means, a text a column); and the metrics without values by their reason."""

    columns: list[str]
    rows: list[tuple[str, str, list[str]]]
    absent: dict[str, list[str]]


def metric_table(samples: dict, metrics: dict) -> Table:
    """Every metric of every model beside the photos' own value and the paper's."""
    others = [name for name in samples["models"] if name not in (BASELINE, FINETUNED)]
    models, paper = metrics["models"], metrics["paper"]
    columns = [label(BASELINE), label(FINETUNED), "change", "your photos"]
    columns += [*map(label, others), *(f"paper: {name}" for name in paper)]
    table = Table(columns, [], {})
    for key, metric in METRICS.items():
        values = {name: models[name][key]["value"] for name in samples["models"]}
        if all(value is None for value in values.values()):
            table.absent.setdefault(models[FINETUNED][key]["reason"], []).append(metric.label)
            continue
        change = metrics["changes"][FINETUNED].get(key, {}).get("text", "")
        of_photos = metrics["photos"].get(OF_PHOTOS.get(key, ""), {}).get("value")
        cells = [number(values[BASELINE]), number(values[FINETUNED]), change, number(of_photos)]
        cells += [*(number(values[name]) for name in others), *(number(row.get(key)) for row in paper.values())]
        table.rows.append((metric.label, metric.meaning, [cell or "–" for cell in cells]))
    return table
