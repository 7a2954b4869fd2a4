"""The images of an evaluation as rows of numbers: embeddings, each image's own values, and which are photos again."""

import contextlib
import csv
import functools
import io
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from utils.dataset import decode
from utils.evaluation import metrics, near_duplicates
from utils.evaluation.encoders import Encoder
from utils.evaluation.prompts import OTHER, PLACE, SUBJECT, class_prompt, dozen_words, without_identifier
from utils.evaluation.samples import BASELINE, EMBEDDINGS_FILE, all_images, settings_sha256
from utils.files.atomic import replace_path
from utils.files.hashing import sha256_of_all
from utils.models.drawing import is_blank

COLUMNS = ("clip_i", "clip_t", "dino")  # each image's own values


class KeptRows:
    """Embeddings that lie beside the images, by the encoder and the SHA-256 of the image's file."""

    def __init__(self, folder: Path):
        self.path = folder / EMBEDDINGS_FILE
        self.known: dict[str, np.ndarray] = {}
        with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile), np.load(self.path) as file:
            self.known = {name: file[name] for name in file.files}
        self.used: dict[str, np.ndarray] = {}

    def rows(self, encoder: Encoder, digests: list[str], images: list[Image.Image]) -> np.ndarray:
        """Unit vectors [N,D] of the images; those that are not known are embedded."""
        prefix = settings_sha256(encoder.description() | dict(folder=None))[:16]
        names = [f"{prefix}/{digest}" for digest in digests]
        new = {name: image for name, image in zip(names, images, strict=True) if name not in self.known}
        if new:
            self.known |= zip(new, encoder.images(list(new.values())), strict=True)
        self.used |= {name: self.known[name] for name in names}
        return np.stack([self.known[name] for name in names])

    def save(self) -> None:
        """Keeps those that were asked for."""
        file, rows = io.BytesIO(), dict(written_by_evaluate=np.zeros(0)) | self.used
        np.savez(file, allow_pickle=False, **rows)
        replace_path(self.path, lambda part: part.write_bytes(file.getvalue()), is_shared=True)


class ImageTable:
    """All images of samples.json, the candidates' among them.

    Attributes:
        images, photos: unit vectors [N,D] by "clip" and "dino", of the encoders that there are.
        values: of the columns that can be computed, [N].
        blank: files of images of one colour.
        text: text to unit vector [D]; None without a text tower.
    """

    def __init__(
        self, samples: dict, folder: Path, photos: Mapping[Path, Image.Image], encoders: Mapping[str, Encoder | None]
    ):
        self.samples, self.entries = samples, all_images(samples)
        self.num_own = len(samples["images"])
        self.photo_pictures = photos
        self.names = {name: encoder.name for name, encoder in encoders.items() if encoder is not None}
        paths = [folder / entry["file"] for entry in self.entries]
        self.pictures = [decode(path) for path in paths]
        self.blank = [e["file"] for e, picture in zip(self.entries, self.pictures, strict=True) if is_blank(picture)]
        digests = sha256_of_all([*paths, *photos])
        self.photo_digests = {path.name: digests[path] for path in photos}
        kept = KeptRows(folder)
        self.images: dict[str, np.ndarray] = {}
        self.photos: dict[str, np.ndarray] = {}
        once = {digests[path]: photo for path, photo in photos.items()}  # a photo that is there twice is one
        for name, encoder in encoders.items():
            if encoder is not None:
                self.images[name] = kept.rows(encoder, [digests[path] for path in paths], self.pictures)
            if encoder is not None and photos:
                self.photos[name] = kept.rows(encoder, list(once), list(once.values()))
        kept.save()
        clip = encoders["clip"]
        self.text: Callable[[str], np.ndarray] | None = _reader(clip, self._texts()) if clip and clip.reads else None
        self.values = {
            column: metrics.photo_similarity(self.images[name], self.photos[name])
            for column, name in (("clip_i", "clip"), ("dino", "dino"))
            if name in self.photos
        }
        if self.text is not None:
            texts = np.stack([self.text(self.plain(entry["prompt"])) for entry in self.entries])
            self.values["clip_t"] = metrics.text_similarity(self.images["clip"], texts)

    def _texts(self) -> Iterable[str]:
        class_name = self.samples["class_name"]
        words = [class_prompt(word) for word in dozen_words(class_name)] if class_name else []
        return [*words, *(self.plain(entry["prompt"]) for entry in self.entries)]

    def plain(self, prompt: str) -> str:
        """A prompt as CLIP knows it: without the subject's own name."""
        return without_identifier(prompt, self.samples["identifier"])

    def rows(self, model: str, role: str, *, of_candidates: bool = False) -> np.ndarray:
        """Indices [P,K] of the images of a model, a row a prompt, a column a seed."""
        groups: dict[str, list[int]] = {}
        for index, entry in enumerate(self.entries):
            if (entry["model"], entry["role"], index >= self.num_own) == (model, role, of_candidates):
                groups.setdefault(entry["prompt"], []).append(index)
        return np.array(list(groups.values()), int) if groups else np.empty((0, 0), int)

    def others(self, model: str, *, of_candidates: bool = False) -> list[dict]:
        """Of each image of other things, which of the drawn prompts it is nearest to; none without a text tower."""
        rows = self.rows(model, OTHER, of_candidates=of_candidates)
        if self.text is None or not rows.size:
            return []
        prompts = [self.entries[row[0]]["prompt"] for row in rows]
        class_name = self.samples["class_name"]
        texts = list(dict.fromkeys([*prompts, *([class_prompt(class_name)] if class_name else [])]))
        vectors = np.stack([self.text(self.plain(text)) for text in texts])
        found = []
        for row in rows.ravel():
            nearest = texts[int((vectors @ self.images["clip"][row]).argmax())]
            entry = self.entries[row]
            kept = nearest == entry["prompt"]
            found.append(dict(file=entry["file"], prompt=entry["prompt"], nearest=nearest, kept=kept))
        return found

    def copies(self, model: str, *, of_candidates: bool = False) -> tuple[list[dict], int]:
        """(pictures of the subject that are a photo again, of how many that were compared)."""
        rows = [self.rows(model, role, of_candidates=of_candidates).ravel() for role in (SUBJECT, PLACE)]
        looked_at = np.concatenate(rows)
        if not self.photo_pictures or not looked_at.size or model == BASELINE:
            return [], 0
        names = [path.name for path in self.photo_pictures]
        pictures = near_duplicates.prepare([self.pictures[row] for row in looked_at])
        found = zip(looked_at, *near_duplicates.nearest(pictures, self.photo_greys), strict=True)
        return [
            dict(file=self.entries[row]["file"], photo=names[photo], sameness=float(sameness))
            for row, photo, sameness in found
            if sameness >= near_duplicates.COPY
        ], len(looked_at)

    @functools.cached_property
    def photo_greys(self) -> near_duplicates.Greys:
        return near_duplicates.prepare(list(self.photo_pictures.values()))


def _reader(clip: Encoder, texts: Iterable[str]) -> Callable[[str], np.ndarray]:
    distinct = list(dict.fromkeys(texts))
    known = dict(zip(distinct, clip.texts(distinct), strict=True))
    return known.__getitem__


def as_csv(table: ImageTable) -> str:
    """A line an image: its settings and its own values; an empty cell if there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "model", "role", "prompt", "seed", *COLUMNS])
    for index, entry in enumerate(table.entries[: table.num_own]):
        cells = [entry[name] for name in ("file", "model", "role", "prompt", "seed")]
        cells += [f"{table.values[name][index]:.6f}" if name in table.values else "" for name in COLUMNS]
        writer.writerow(cells)
    return text.getvalue()
