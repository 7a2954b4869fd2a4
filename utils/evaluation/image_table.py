"""The images of an evaluation as rows of numbers: embeddings, each image's own values, and which are photos again."""

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from utils.dataset import decode
from utils.evaluation import metrics, near_duplicates
from utils.evaluation.candidates import FOLDER as CANDIDATES
from utils.evaluation.encoders import Encoder
from utils.evaluation.prompts import OTHER, PLACE, SUBJECT, class_prompt, dozen_words, without_identifier
from utils.evaluation.samples import BASELINE, EMBEDDINGS_FILE, settings_sha256
from utils.files.atomic import replace_path
from utils.files.hashing import sha256_of_all
from utils.models.drawing import is_blank


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
    """All images of samples.json; the candidates' are of models called candidates/NAME.

    Attributes:
        kept: the embeddings, to be saved.
        images, photos: unit vectors [N,D] by "clip" and "dino", of the encoders that there are.
        values: of the columns that can be computed, [N].
        text: text to unit vector [D], the subject's own name left out; None without a text tower.
        blank: files of images of one colour.
        others, places: by model, of each image of other things and of the subject in other places, which of such
            prompts that were drawn, or the bare class, it is nearest to; none unless CLIP reads.
        copies: by model, (pictures of the subject that are a photo again, of how many that were compared).
    """

    def __init__(
        self, samples: dict, folder: Path, photos: Mapping[Path, Image.Image], encoders: Mapping[str, Encoder | None]
    ):
        self.samples = samples
        self.entries = list(samples["images"])
        for entry in (samples.get("candidates") or {}).get("images", []):
            self.entries.append(entry | dict(model=f"{CANDIDATES}/{entry['model']}"))
        paths = [folder / entry["file"] for entry in self.entries]
        pictures = [decode(path) for path in paths]
        self.blank = [entry["file"] for entry, each in zip(self.entries, pictures, strict=True) if is_blank(each)]
        digests = sha256_of_all([*paths, *photos])
        self.photo_digests = {path.name: digests[path] for path in photos}
        self.names = {name: encoder.name for name, encoder in encoders.items() if encoder is not None}
        self.images, self.photos, self.kept = {}, {}, KeptRows(folder)
        once = {digests[path]: photo for path, photo in photos.items()}  # a photo that is there twice is one
        for name, encoder in encoders.items():
            if encoder is not None:
                self.images[name] = self.kept.rows(encoder, [digests[path] for path in paths], pictures)
            if encoder is not None and photos:
                self.photos[name] = self.kept.rows(encoder, list(once), list(once.values()))
        self.text = self._reader(encoders["clip"])
        self.values = self._values()
        models = dict.fromkeys(entry["model"] for entry in self.entries)
        self.others, self.places = ({name: self._nearest(name, role) for name in models} for role in (OTHER, PLACE))
        self.copies = self._copies(models, pictures, photos)

    def _reader(self, clip: Encoder | None) -> Callable[[str], np.ndarray] | None:
        """For the texts that are asked for: the prompts, and the words that the scorer is tested with."""
        if clip is None or clip.text_features is None:
            return None
        words = dozen_words(self.samples["class_name"]) if self.samples["class_name"] else []
        texts = [*map(class_prompt, words), *(entry["prompt"] for entry in self.entries)]
        plain = {text: without_identifier(text, self.samples["identifier"]) for text in texts}
        distinct = list(dict.fromkeys(plain.values()))
        known = dict(zip(distinct, clip.texts(distinct), strict=True))
        return lambda text: known[plain[text]]

    def _values(self) -> dict[str, np.ndarray]:
        known = {name: column for name, (column, _) in metrics.LIKENESS.items() if name in self.photos}
        values = {known[name]: metrics.photo_similarity(self.images[name], self.photos[name]) for name in known}
        if self.text is not None:
            texts = np.stack([self.text(entry["prompt"]) for entry in self.entries])
            values["clip_t"] = metrics.text_similarity(self.images["clip"], texts)
        return values

    def rows(self, model: str, *roles: str) -> np.ndarray:
        """Indices [P,K] of the images of a model, a row a prompt, a column a seed."""
        groups: dict[str, list[int]] = {}
        for index, entry in enumerate(self.entries):
            if entry["model"] == model and entry["role"] in roles:
                groups.setdefault(entry["prompt"], []).append(index)
        return np.array(list(groups.values()), int) if groups else np.empty((0, 0), int)

    def _nearest(self, model: str, role: str) -> list[dict]:
        rows, class_name = self.rows(model, role), self.samples["class_name"]
        if self.text is None or not rows.size:
            return []
        prompts = [self.entries[row[0]]["prompt"] for row in rows]
        texts = list(dict.fromkeys([*prompts, *([class_prompt(class_name)] if class_name else [])]))
        nearest = (self.images["clip"][rows.ravel()] @ np.stack([*map(self.text, texts)]).T).argmax(axis=1)
        return [
            dict(file=e["file"], prompt=e["prompt"], nearest=texts[place], kept=texts[place] == e["prompt"])
            for e, place in zip((self.entries[row] for row in rows.ravel()), nearest, strict=True)
        ]

    def _copies(
        self, models: Iterable[str], pictures: list[Image.Image], photos: Mapping[Path, Image.Image]
    ) -> dict[str, tuple[list[dict], int]]:
        found: dict[str, tuple[list[dict], int]] = {model: ([], 0) for model in models}
        names, prepared = [path.name for path in photos], None
        for model in found:
            looked_at = [row for role in (SUBJECT, PLACE) for row in self.rows(model, role).ravel()]
            if not photos or not looked_at or model.endswith(BASELINE):
                continue
            prepared = prepared or near_duplicates.prepare(list(photos.values()))
            greys = near_duplicates.prepare([pictures[row] for row in looked_at])
            pairs = zip(looked_at, *near_duplicates.nearest(greys, prepared), strict=True)
            copied = [
                dict(file=self.entries[row]["file"], photo=names[photo], sameness=float(sameness))
                for row, photo, sameness in pairs
                if sameness >= near_duplicates.COPY
            ]
            found[model] = copied, len(looked_at)
        return found
