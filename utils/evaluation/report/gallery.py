"""The photos and the images of every prompt: where each is on the page, what stands below it, and its neighbours."""

import csv
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from utils.evaluation.comparison import square
from utils.evaluation.report.images import Picture, picture
from utils.evaluation.samples import BASELINE, FINETUNED, METRICS_CSV
from utils.evaluation.wording import MINUS

ROLES = {
    "subject": ("The subject", "The same seed in every row: what differs is the fine-tuning."),
    "place": ("The subject in other places", "One seed each."),
    "class": ("The class alone", "Without the subject's own name. Ideally as varied as the baseline's."),
    "other": ("Other things", "Nothing of the subject should be seen here: what is, has drifted."),
}
# Bytes within the page, to which base64 adds a third.
IMAGE_BYTES = 2_000_000  # all images
PHOTO_BYTES = 400_000  # all photos
LARGE_BYTES = 100_000  # each picture of the first screen
MAX_OPEN = 80  # images that are shown unfolded, and more only of the first prompt
NAMES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
INDEX_FROM = 5  # prompts: fewer are found without an index


class Cell(NamedTuple):
    """An image on the page; `number` is its place among all of them, from 1."""

    number: int
    picture: Picture
    title: str  # what it is, for who sees it alone
    caption: str  # what stands below it
    score: str
    url: str  # of the file beside the page, as a URL; "" for photos, which lie elsewhere
    file: str
    above: tuple[int, str] | None = None  # number and model of the same seed in the row above
    below: tuple[int, str] | None = None


class Row(NamedTuple):
    model: str
    cells: list[Cell]


class Score(NamedTuple):
    """A metric's mean over a prompt's images, of the baseline and of the fine-tuned model."""

    name: str
    baseline: str
    finetuned: str


class Group(NamedTuple):
    """The images of one prompt: a row a model, a column a seed."""

    number: int
    role: tuple[str, str]  # title and explanation
    prompt: str
    rows: list[Row]
    scores: list[Score]
    is_open: bool


class Gallery(NamedTuple):
    """All images of a page."""

    photos: list[Cell]
    groups: list[Group]
    has_index: bool
    has_scores: bool
    last: int  # the largest number
    first: list[tuple[str, Picture, int]]  # the first screen's: what it is, the picture, its number on the page

    def places(self) -> dict[str, int]:
        """Each image's number by its file."""
        return {cell.file: cell.number for group in self.groups for row in group.rows for cell in row.cells}


def make_gallery(output_dir: Path, samples: dict, photos: dict[Path, Image.Image], is_scored: bool) -> Gallery:
    """All images in the order of the page. `photos` are those of the subject, by path."""
    share = IMAGE_BYTES // max(1, len(samples["images"]))
    table = per_image_values(output_dir) if is_scored else {}
    cells = photo_cells(photos)
    groups: list[Group] = []
    next_number = len(cells) + 1
    for prompt in samples["prompts"]:
        entries = [entry for entry in samples["images"] if entry["prompt"] == prompt["text"]]
        if prompt["role"] not in ROLES or not entries:
            continue
        is_open = not groups or len(samples["images"]) <= MAX_OPEN
        rows = make_rows(output_dir, entries, next_number, share, table)
        scores = group_scores(entries, table)
        groups.append(Group(len(groups) + 1, ROLES[prompt["role"]], prompt["text"], rows, scores, is_open))
        next_number += sum(len(row.cells) for row in rows)
    first = first_screen(output_dir, photos, cells, groups)
    return Gallery(cells, groups, len(groups) >= INDEX_FROM, bool(table), next_number - 1, first)


def label(model: str) -> str:
    """A model's name for people."""
    return model.replace(FINETUNED, "fine-tuned").replace("@", " at strength ")


def ordered(models: dict) -> list[str]:
    """Baseline first, checkpoints by step, the fine-tuned model last."""
    return [name for name in models if name != FINETUNED] + [FINETUNED]


def photo_cells(photos: dict[Path, Image.Image]) -> list[Cell]:
    """The photos, cut to their centre as they are scored."""
    share = PHOTO_BYTES // max(1, len(photos))
    shown = [(path.name, picture(square(photo), f"Your photo {path.name}", share)) for path, photo in photos.items()]
    return [Cell(number, photo, "Your photo", name, "", "", name) for number, (name, photo) in enumerate(shown, 1)]


def make_rows(
    output_dir: Path, entries: list[dict], first_number: int, share: int, table: dict[str, dict[str, float]]
) -> list[Row]:
    """A row a model; each cell knows its neighbours of the same seed."""
    by_model: dict[str, list[dict]] = {}
    for entry in entries:
        by_model.setdefault(entry["model"], []).append(entry)
    models = [model for model in ordered(by_model) if model in by_model]
    places = {place: number for number, place in enumerate(((m, e["seed"]) for m in models for e in by_model[m]), 1)}

    def neighbour(row: int, seed: int) -> tuple[int, str] | None:
        if not 0 <= row < len(models) or (models[row], seed) not in places:
            return None
        return first_number + places[models[row], seed] - 1, label(models[row])

    def cell(row: int, entry: dict) -> Cell:
        seed, file = entry["seed"], entry["file"]
        title = f"{label(entry['model'])}, seed {seed}"
        return Cell(
            number=first_number + places[entry["model"], seed] - 1,
            picture=picture(output_dir / file, f"{title}: {entry['prompt']}", share),
            title=title,
            caption=f"seed {seed}",
            score=likeness(table.get(file, {})),
            url=quote(file),
            file=file,
            above=neighbour(row - 1, seed),
            below=neighbour(row + 1, seed),
        )

    with ThreadPoolExecutor() as threads:  # making WebP of an image takes long
        return [
            Row(label(name), list(threads.map(cell, repeat(row), by_model[name]))) for row, name in enumerate(models)
        ]


def first_screen(
    output_dir: Path, photos: dict[Path, Image.Image], cells: list[Cell], groups: list[Group]
) -> list[tuple[str, Picture, int]]:
    """The first photo, and the first seed of the first prompt from the baseline and from the fine-tuned model."""
    shown = []
    if cells:
        path, photo = next(iter(photos.items()))
        shown.append(("your photo", picture(square(photo), f"Your photo {path.name}", LARGE_BYTES), cells[0].number))
    rows = {row.model: row.cells[0] for row in groups[0].rows} if groups else {}
    for model in (label(BASELINE), label(FINETUNED)):
        if model in rows:
            cell = rows[model]
            shown.append((model, picture(output_dir / cell.file, cell.picture.alt, LARGE_BYTES), cell.number))
    return shown


def per_image_values(output_dir: Path) -> dict[str, dict[str, float]]:
    """The numbers of metrics.csv by file; nothing if it cannot be read."""
    try:
        with (output_dir / METRICS_CSV).open(encoding="utf-8", newline="") as file:
            return {row["file"]: numbers_of(row) for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError):
        return {}


def numbers_of(row: dict[str, str]) -> dict[str, float]:
    """Those columns of a line of metrics.csv that the page shows and that have a value."""
    return {key: float(row[key]) for key in ("dino", "clip_i", "clip_t") if row.get(key)}


def likeness(values: dict[str, float]) -> str:
    """What stands below an image: DINO if it was computed, else CLIP-I."""
    key = next((key for key in ("dino", "clip_i") if key in values), None)
    return f"{NAMES[key]}\u00a0{short(values[key])}" if key else ""


def group_scores(entries: list[dict], table: dict[str, dict[str, float]]) -> list[Score]:
    """Likeness to the photos and prompt fidelity of a prompt's images."""
    columns = {key for values in table.values() for key in values}
    fidelity = "dino" if "dino" in columns else "clip_i"
    scores = []
    for key in (fidelity, "clip_t"):
        baseline, finetuned = (mean_of(entries, table, model, key) for model in (BASELINE, FINETUNED))
        if baseline is not None and finetuned is not None:
            scores.append(Score(NAMES[key], short(baseline), short(finetuned)))
    return scores


def mean_of(entries: list[dict], table: dict[str, dict[str, float]], model: str, key: str) -> float | None:
    """Over the model's images among `entries`; None if one has no such value."""
    values = [table.get(entry["file"], {}).get(key) for entry in entries if entry["model"] == model]
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there and len(there) == len(values) else None


def short(value: float) -> str:
    """0.12 or \u22120.12."""
    return f"{value:.2f}".replace("-", MINUS)
