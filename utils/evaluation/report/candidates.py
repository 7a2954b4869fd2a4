"""Which of several models to use: likeness to the subject against faithfulness to other prompts, and their images."""

import math
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from utils.evaluation.candidates import describe
from utils.evaluation.report.charts import Scatter, ScatterPoint, scatter_chart
from utils.evaluation.report.images import Picture, picture
from utils.evaluation.samples import BASELINE, FINETUNED, model_folder
from utils.evaluation.wording import number

STRIP_BYTES = 500_000  # within the page, of all images of the strip


class Value(NamedTuple):
    """A number and its interval, as text."""

    text: str
    interval: str


class Drawn(NamedTuple):
    """An image of the strip: `place` is its number in the galleries, if it is there."""

    picture: Picture
    url: str
    place: int | None


class Candidate(NamedTuple):
    number: int
    label: str
    note: str
    command: str
    is_chosen: bool
    values: list[Value]  # along x, along y
    images: list[Drawn]


class Selection(NamedTuple):
    """All that candidates.html.jinja needs."""

    sentence: str
    why: str
    is_good: bool
    names: list[str]  # of the two metrics
    candidates: list[Candidate]
    chart: Scatter | None


def make_selection(output_dir: Path, samples: dict, metrics: dict, places: dict[str, int]) -> Selection | None:
    """The section's values; None if there is nothing to choose among. `places`: an image's number by its file."""
    folders = [model_folder(samples, model) for model in (BASELINE, FINETUNED)]
    given = metrics.get("candidates") or describe(metrics, samples, *folders)
    if given is None:
        return None
    share = STRIP_BYTES // max(1, sum(len(entry["images"]) for entry in given["entries"]))
    candidates = [
        candidate(output_dir, index, entry, given, share, places) for index, entry in enumerate(given["entries"], 1)
    ]
    return Selection(
        sentence=given["sentence"],
        why=given["why"],
        is_good=given["is_good"],
        names=[given["x"]["label"], given["y"]["label"]],
        candidates=candidates,
        chart=chart(given),
    )


def candidate(output_dir: Path, index: int, entry: dict, given: dict, share: int, places: dict[str, int]) -> Candidate:
    """One of metrics.json's candidates as it is shown."""
    images = []
    for image in entry["images"]:
        file = output_dir / image["file"]
        if file.is_file():
            shown = picture(file, f"{entry['label']}, seed {image['seed']}: {image['prompt']}", share)
            images.append(Drawn(shown, quote(image["file"]), places.get(image["file"])))
    values = []
    for axis in ("x", "y"):
        interval = entry["interval"][axis]
        ends = f"{number(interval[0])} to {number(interval[1])}" if interval else ""
        values.append(Value(number(entry["value"][axis]) or "–", ends))
    is_chosen = entry["name"] == given["chosen"]
    return Candidate(index, entry["label"], entry["note"], entry["command"] or "", is_chosen, values, images)


def chart(given: dict) -> Scatter | None:
    """A dot a candidate, numbered as in the strip; None if none has both values."""
    points = []
    for index, entry in enumerate(given["entries"], 1):
        x, y = entry["value"]["x"], entry["value"]["y"]
        if all(value is not None and math.isfinite(value) for value in (x, y)):
            is_chosen = entry["name"] == given["chosen"]
            points.append(ScatterPoint(x, y, str(index), is_chosen, entry["interval"]["x"], entry["interval"]["y"]))
    if not points:
        return None
    lines = [(given["y"]["baseline"], "the baseline", "baseline"), (given["y_limit"], "visibly less", "limit")]
    return scatter_chart(
        points,
        lines=[line for line in lines if line[0] is not None],
        x_label=f"likeness to your subject ({given['x']['label']}) →",
        y_label=f"↑ faithfulness to other prompts ({given['y']['label']})",
    )
