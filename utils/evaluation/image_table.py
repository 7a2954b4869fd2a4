"""The images of an evaluation as rows of numbers: embeddings, and each image's own values."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from utils.dataset import decode
from utils.evaluation import metrics
from utils.evaluation.encoders import Encoder
from utils.evaluation.prompts import SUBJECT, class_prompt, names_only_class, without_identifier
from utils.models.drawing import is_blank

GET_CLIP = (
    "git lfs install && git clone https://huggingface.co/openai/clip-vit-base-patch32 model/clip-vit-base-patch32"
)
GET_DINO = "git lfs install && git clone https://huggingface.co/facebook/dino-vits16 model/dino-vits16"
A_CLIP = f"a CLIP model: {GET_CLIP}, then --clip_model model/clip-vit-base-patch32"
NO_CLIP = f"needs {A_CLIP}"
NO_TEXT = (
    "needs CLIP's whole text tower: the pipeline's text encoder is one without the projection that makes texts and "
    f"images comparable, and the safety checker holds the image tower only: {A_CLIP}"
)
NO_DINO = f"needs a DINO model: {GET_DINO}, then --dino_model model/dino-vits16"
NO_PHOTOS = "needs your photos: --instance_data_dir"
# Each image's own values, and what they are computed with.
COLUMNS = {
    "clip_i": "clip",
    "clip_t": "text",
    "clip_t_with_token": "text",
    "dino": "dino",
    "copy_clip": "clip",
    "copy_dino": "dino",
}
Value = TypeVar("Value", np.ndarray, float)
Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]


class ImageTable:
    """Embeddings of all images and photos, and each image's own values.

    Attributes:
        images, photos: unit vectors [N,D] by "clip" and "dino"; None without that encoder, or without photos.
        blank: the entries of images of one colour.
        values: of every column of COLUMNS, [N]; None if it cannot be computed.
        class_row: the class prompt's unit vector [D]; None without a text tower or a class.
    """

    def __init__(
        self,
        samples: dict,
        folder: Path,
        photos: Sequence[Image.Image],
        clip: Encoder | None,
        dino: Encoder | None,
    ):
        self.entries, self.folder = samples["images"], folder
        images = [decode(folder / entry["file"]) for entry in self.entries]
        self.blank = [entry for entry, image in zip(self.entries, images, strict=True) if is_blank(image)]
        named = {"clip": clip, "dino": dino}
        self.images = {name: each.images(images) if each else None for name, each in named.items()}
        self.photos = {name: each.images(photos) if each and photos else None for name, each in named.items()}
        self.reasons = dict(clip=NO_CLIP, dino=NO_DINO, text=NO_TEXT if clip else NO_CLIP)
        texts, identifier = [entry["prompt"] for entry in self.entries], samples["identifier"]
        self.values = dict(
            clip_i=self._to_photos("clip", metrics.photo_similarity),
            dino=self._to_photos("dino", metrics.photo_similarity),
            copy_clip=self._to_photos("clip", metrics.nearest_photo_similarity),
            copy_dino=self._to_photos("dino", metrics.nearest_photo_similarity),
            clip_t=self._to_texts(clip, [without_identifier(text, identifier) for text in texts]),
            clip_t_with_token=self._to_texts(clip, texts),
        )
        class_name = samples["class_name"]
        self.class_row = clip.texts([class_prompt(class_name)])[0] if clip and clip.reads and class_name else None
        prompts = {entry["prompt"] for entry in self.entries if entry["role"] == SUBJECT}
        self.names_only_class = all(names_only_class(prompt, identifier, class_name) for prompt in prompts)

    def _to_photos(self, encoder: str, similarity: Similarity) -> np.ndarray | None:
        images, photos = self.images[encoder], self.photos[encoder]
        return None if images is None or photos is None else similarity(images, photos)

    def _to_texts(self, clip: Encoder | None, texts: list[str]) -> np.ndarray | None:
        images = self.images["clip"]
        if clip is None or images is None or not clip.reads:
            return None
        distinct = list(dict.fromkeys(texts))
        rows = clip.texts(distinct)
        return metrics.text_similarity(images, rows[[distinct.index(text) for text in texts]])

    def rows(self, model: str, role: str) -> np.ndarray:
        """Indices [P,K] of the images of a model, a row a prompt, a column a seed."""
        groups: dict[str, list[int]] = {}
        for index, entry in enumerate(self.entries):
            if (entry["model"], entry["role"]) == (model, role):
                groups.setdefault(entry["prompt"], []).append(index)
        return np.array(list(groups.values()), int) if groups else np.empty((0, 0), int)

    def reason(self, encoder: str) -> str:
        """Why there is no likeness to the photos by this encoder."""
        return self.reasons[encoder] if self.images[encoder] is None else NO_PHOTOS

    def missing(self, column: str, rows: np.ndarray, no_images: str) -> str | None:
        """Why a column has no value for these images; None if it has."""
        if self.values[column] is None:
            encoder = COLUMNS[column]
            return self.reasons["text"] if encoder == "text" else self.reason(encoder)
        return None if rows.size else no_images


def as_csv(table: ImageTable) -> str:
    """A line an image: its settings and its own values; an empty cell if there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "model", "role", "prompt", "seed", *COLUMNS])
    for index, entry in enumerate(table.entries):
        cells = [entry[name] for name in ("file", "model", "role", "prompt", "seed")]
        for name in COLUMNS:
            values = table.values[name]
            cells.append("" if values is None else f"{values[index]:.6f}")
        writer.writerow(cells)
    return text.getvalue()


def present(values: Value | None) -> Value:
    """What is known to be there."""
    assert values is not None
    return values
