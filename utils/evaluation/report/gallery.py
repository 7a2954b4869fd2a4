"""The pictures of the page, numbered as they first come on it: cells, in sets that stand together."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from utils.evaluation.candidates import label
from utils.evaluation.comparison import square
from utils.evaluation.prompts import CLASS, OTHER, PLACE, SUBJECT
from utils.evaluation.report.images import Picture, picture
from utils.evaluation.samples import BASELINE, FINETUNED, all_images

ROLES = {SUBJECT: "The subject", PLACE: "The subject in other places", CLASS: "The class alone", OTHER: "Other things"}
# Bytes within the page, to which base64 adds a third.
IMAGE_BYTES = 1_500_000  # all images
PHOTO_BYTES = 400_000  # all photos
LARGE_BYTES = 50_000  # each image of the first two rows
NUM_PHOTOS, NUM_PLACES = 4, 4  # of the first two rows
PAIR = (BASELINE, FINETUNED)


class Cell(NamedTuple):
    """A picture on the page.

    Attributes:
        number: its place among all of them, from 1.
        picture: made in a thread.
        title, prompt: what it is, for who sees it alone.
        url: of the file beside the page; "" for photos, which lie elsewhere.
        caption, note: what stands below it.
        is_again: it has a number from further up, and is a link to there.
    """

    number: int
    picture: "Future[Picture]"
    title: str
    prompt: str
    file: str
    url: str
    caption: str = ""
    note: str = ""
    is_again: bool = False
    is_chosen: bool = False


class Set(NamedTuple):
    """Cells that stand together, what they are, and the command that makes their model."""

    title: str
    cells: list[Cell]
    command: str | None = None


class Album:
    """Hands out the pictures of an evaluation."""

    def __init__(self, output_dir: Path, samples: dict, metrics: dict | None, photos: dict[Path, Image.Image]):
        self.output_dir = output_dir
        quick = samples.get("candidates") or dict(samples, images=[])
        self.images, self.candidates = samples["images"], quick["images"]
        steps, usual = quick["num_inference_steps"], samples["num_inference_steps"]
        self.quickly = f"Drawn in {steps} steps, those above in {usual}" if steps != usual else ""
        self.entries = {entry["file"]: entry for entry in all_images(samples)}
        self.photos = {path.name: photo for path, photo in photos.items()}
        self.notes = notes(metrics) if metrics is not None else {}
        self.shown: dict[tuple[str, str], Cell] = {}  # ("photo" or "image", its file)
        self.threads = ThreadPoolExecutor()  # making WebP of an image takes long

    def image(self, file: str, caption: str, is_large: bool = False) -> Cell:
        """An image of samples.json."""
        entry = self.entries[file]
        title = f"{label(entry['model'])}, seed {entry['seed']}"
        told = (title, entry["prompt"], file, quote(file))
        path, most_bytes = self.output_dir / file, LARGE_BYTES if is_large else IMAGE_BYTES // len(self.entries)
        cell = self._cell("image", told, lambda: picture(path, f"{title}: {entry['prompt']}", most_bytes))
        return cell._replace(caption=caption, note=self.notes.get(file, ""))

    def photo(self, name: str, caption: str = "") -> Cell:
        """A photo, cut to its centre as it is scored."""
        photo, most_bytes = self.photos[name], PHOTO_BYTES // len(self.photos)
        told = ("Your photo", "", name, "")
        cell = self._cell("photo", told, lambda: picture(square(photo), f"Your photo {name}", most_bytes))
        return cell._replace(caption=caption)

    def _cell(self, kind: str, told: tuple[str, str, str, str], make: Callable[[], Picture]) -> Cell:
        key = (kind, told[2])
        if key in self.shown:
            return self.shown[key]._replace(is_again=True)
        self.shown[key] = Cell(len(self.shown) + 1, self.threads.submit(make), *told)
        return self.shown[key]

    def columns(self, role: str, *, of_candidates: bool = False) -> Iterator[tuple[str, int, dict[str, str]]]:
        """(prompt, seed, the images' files by model: the fine-tuned one last) in the order of samples.json."""
        found: dict[tuple[str, int], dict[str, str]] = {}
        entries = self.candidates if of_candidates else self.images
        for entry in sorted(entries, key=lambda entry: entry["model"] == FINETUNED):
            if entry["role"] == role:
                found.setdefault((entry["prompt"], entry["seed"]), {})[entry["model"]] = entry["file"]
        return ((*key, files) for key, files in found.items())

    def side_by_side(
        self, title: str, files: dict[str, str], models: Collection[str] = (), is_large: bool = False
    ) -> Set:
        """The models' images of one prompt and seed."""
        cells = [self.image(files[name], label(name), is_large) for name in models or files if name in files]
        return Set(title, cells)


def first_row(album: Album) -> list[Set]:
    """A few photos, and the first seed of the first prompt by the baseline and by the fine-tuned model."""
    shown = list(album.photos)[: NUM_PHOTOS if len(album.photos) >= NUM_PHOTOS else 1]
    title = "your photos" if len(shown) > 1 else "your photo"
    photos = [Set(title, [album.photo(name) for name in shown])] if shown else []
    _, _, files = next(album.columns(SUBJECT), ("", 0, {}))
    return photos + [Set(label(name), [album.image(files[name], "", is_large=True)]) for name in PAIR if name in files]


def second_row(album: Album) -> list[Set]:
    """The first seed of the subject in other places, or of more prompts of it, by the baseline and fine-tuned."""
    first: dict[str, dict[str, str]] = {}
    for prompt, _, files in [*album.columns(PLACE)] or album.columns(SUBJECT):
        first.setdefault(prompt, files)
    shown = [each for each in first.items() if ("image", each[1].get(FINETUNED, "")) not in album.shown]
    return [album.side_by_side(prompt, files, PAIR, is_large=True) for prompt, files in shown[:NUM_PLACES]]


def strip(album: Album, choice: dict | None) -> Set:
    """One seed over steps and strengths: of the choice's candidates, else of all models if there are several."""
    _, _, files = next(album.columns(SUBJECT, of_candidates=bool(album.candidates)), ("", 0, {}))
    if len(files) < 3:
        return Set("", [])
    if choice is None:
        return album.side_by_side(album.quickly, files)
    cells = album.side_by_side("", files, [BASELINE]).cells
    for entry in (entry for entry in choice["entries"] if entry["name"] in files):
        cell, is_chosen = album.image(files[entry["name"]], entry["label"]), entry["name"] == choice["chosen"]
        cells.append(cell._replace(note=entry["note"], is_chosen=is_chosen))
    return Set(album.quickly, cells)


def choice_images(album: Album, choice: dict | None) -> list[Set]:
    """Every image of every candidate, and those that are photos again beside their photos."""
    by_model: dict[str, list[Cell]] = {}
    for entry in album.candidates:
        caption = entry["prompt"] if entry["role"] == OTHER else f"seed {entry['seed']}"
        by_model.setdefault(entry["model"], []).append(album.image(entry["file"], caption))
    entries = {entry["name"]: entry for entry in choice["entries"]} if choice else {}
    sets = []
    for name in sorted(by_model, key=[BASELINE, *entries, *by_model].index):
        entry = entries.get(name, dict(label=label(name), command=None, copies=[]))
        sets += [Set(entry["label"], by_model[name], entry["command"]), *pairs(album, entry["copies"])]
    return sets


def pairs(album: Album, copies: list[dict]) -> list[Set]:
    """Each photo beside the image that is it again."""
    sets = []
    for copy in copies:
        if copy["photo"] in album.photos and copy["file"] in album.entries:
            image = album.image(copy["file"], label(album.entries[copy["file"]]["model"]))
            sets.append(Set("", [album.photo(copy["photo"], "your photo"), image]))
    return sets


def rest(album: Album) -> dict[str, list[Set]]:
    """By heading, what no other part of the page shows."""
    photos = [Set("", [album.photo(name, name)]) for name in album.photos if ("photo", name) not in album.shown]
    found = {"More of your photos": photos}
    for role, title in ROLES.items():
        columns = list(album.columns(role))
        num_seeds = Counter(prompt for prompt, _, _ in columns)
        unseen = [each for each in columns if not album.shown.keys() >= {("image", file) for file in each[2].values()}]
        told = [f"{prompt}, seed {seed}" if num_seeds[prompt] > 1 else prompt for prompt, seed, _ in unseen]
        found[title] = [album.side_by_side(*each) for each in zip(told, (files for *_, files in unseen), strict=True)]
    return {title: sets for title, sets in found.items() if sets}


def notes(metrics: dict) -> dict[str, str]:
    """What is said of single images, by their files."""
    found = {file: "one colour" for model in metrics["models"].values() for file in model["blank_images"]}
    pictures = [each for role in ("others", "places") for model in metrics[role].values() for each in model]
    return found | {each["file"]: f"nearer to “{each['nearest']}”" for each in pictures if not each["kept"]}
