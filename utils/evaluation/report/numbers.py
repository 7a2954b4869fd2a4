"""The report's table of metrics: every model beside the photos' own values and the paper's."""

from pathlib import Path
from typing import NamedTuple

from utils.evaluation.report.gallery import label
from utils.evaluation.samples import BASELINE, FINETUNED
from utils.evaluation.wording import number, signed

MORE, LESS = "↑ more is better", "↓ less is better"
AS_PHOTOS = "≈ as your photos is best"
BELOW_PHOTOS = "↓ above your photos' own: copied"
REPORTED_METRICS = (
    ("dino", "DINO", "subject fidelity: mean cosine to your photos, DINO features", AS_PHOTOS),
    ("clip_i", "CLIP-I", "subject fidelity: mean cosine to your photos, CLIP features", AS_PHOTOS),
    ("clip_t", "CLIP-T", "prompt fidelity: cosine of image and prompt, the subject's name left out", MORE),
    ("clip_t_with_token", "CLIP-T, with name", "prompt fidelity with the prompt as it stands", MORE),
    ("copy_dino", "COPY (DINO)", "mean cosine to the nearest photo", BELOW_PHOTOS),
    ("copy_clip", "COPY (CLIP)", "mean cosine to the nearest photo", BELOW_PHOTOS),
    ("copy_dino_max", "COPY max (DINO)", "the image that is most like a photo", BELOW_PHOTOS),
    ("copy_clip_max", "COPY max (CLIP)", "the image that is most like a photo", BELOW_PHOTOS),
    ("div_dino", "DIV (DINO)", "variety: mean distance of two seeds of a prompt", MORE),
    ("div_clip", "DIV (CLIP)", "variety: mean distance of two seeds of a prompt", MORE),
    ("pres_dino", "PRES (DINO)", "likeness of the bare class to your photos", LESS),
    ("pres_clip", "PRES (CLIP)", "likeness of the bare class to your photos", LESS),
    ("clip_t_class", "CLIP-T, class", "prompt fidelity on the bare class", MORE),
    ("clip_t_other", "CLIP-T, other things", "prompt fidelity without the subject", MORE),
    ("dino_other", "DINO, other things", "likeness to your photos without the subject", LESS),
    ("clip_i_other", "CLIP-I, other things", "likeness to your photos without the subject", LESS),
)
# The same value of the photos themselves, if there is one.
OF_PHOTOS = {
    "dino": "real_dino",
    "clip_i": "real_clip",
    "copy_dino": "nearest_dino",
    "copy_clip": "nearest_clip",
    "clip_t": "clip_t",
    "clip_t_class": "clip_t_class",
    "div_dino": "real_dino",
    "div_clip": "real_clip",
}
# DreamBooth, arXiv 2208.12242, table 1: real images, DreamBooth on Stable Diffusion, Textual Inversion on the same.
PAPER = {"dino": (0.774, 0.668, 0.569), "clip_i": (0.885, 0.803, 0.780), "clip_t": (None, 0.305, 0.255)}
PAPER_COLUMNS = ("paper: photos", "paper: DreamBooth", "paper: Textual Inversion")
# Numbers of other encoders say nothing beside these.
PAPER_ENCODERS = {"dino": ("dino", "dino-vits16"), "clip_i": ("clip", "clip-vit-base-patch32")}
PAPER_ENCODERS["clip_t"] = PAPER_ENCODERS["clip_i"]


class Cell(NamedTuple):
    """A number, its interval, and the reason if there is no number."""

    text: str
    interval: str = ""
    reason: str | None = None


class MetricRow(NamedTuple):
    name: str
    meaning: str
    direction: str
    cells: list[Cell]


def metric_table(samples: dict, metrics: dict) -> dict:
    """Every metric of every model beside the photos' own value and the paper's; and those that were not computed."""
    models = [BASELINE, FINETUNED, *(name for name in samples["models"] if name not in (BASELINE, FINETUNED))]
    paper = {key: paper_values(metrics, key) for key, *_ in REPORTED_METRICS}
    has_paper = any(value is not None for values in paper.values() for value in values)
    rows = []
    absent: dict[str, list[str]] = {}
    for key, name, meaning, direction in REPORTED_METRICS:
        entries = [metrics["models"][model][key] for model in models]
        if all(entry["value"] is None for entry in entries):
            absent.setdefault(entries[-1]["reason"], []).append(name)
            continue
        change = metrics["changes"][FINETUNED].get(key)
        baseline, finetuned, *checkpoints = map(metric_cell, entries)
        cells = [
            baseline,
            finetuned,
            change_cell(change) if change else Cell(""),
            Cell(number(of_photos(metrics, key))),
        ]
        cells += [*checkpoints, *(Cell(number(value)) for value in (paper[key] if has_paper else ()))]
        rows.append(MetricRow(name, meaning, direction, cells))
    columns = [*map(label, models[:2]), "change", "your photos", *map(label, models[2:])]
    columns += PAPER_COLUMNS if has_paper else ()
    return dict(metric_rows=rows, absent_metrics=absent, columns=columns, has_paper=has_paper)


def of_photos(metrics: dict, key: str) -> float | None:
    """The photos' own value of a metric, if there is such a thing; their variety is what their likeness leaves."""
    value = metrics["photos"].get(OF_PHOTOS.get(key, ""), {}).get("value")
    return 1 - value if value is not None and key.startswith("div_") else value


def paper_values(metrics: dict, key: str) -> tuple[float | None, ...]:
    """The paper's numbers in the order of PAPER_COLUMNS, if they are of the same encoder by its folder's name."""
    kind, folder = PAPER_ENCODERS.get(key, ("", ""))
    encoder = metrics["encoders"].get(kind)
    is_same = encoder is not None and Path(encoder["folder"]).name == folder
    return PAPER[key] if is_same else (None,) * len(PAPER_COLUMNS)


def metric_cell(entry: dict) -> Cell:
    if entry["value"] is None:
        return Cell("\u2013", reason=entry["reason"])
    interval = entry.get("interval")
    return Cell(number(entry["value"]), f"{number(interval[0])} to {number(interval[1])}" if interval else "")


def change_cell(change: dict) -> Cell:
    value, *interval = map(signed, (change["value"], *(change["interval"] or ())))
    return Cell(value, " to ".join(interval))
