"""Whether an encoder knows the subject's photos, which is tested before its likeness is believed."""

import math
from typing import NamedTuple

import numpy as np

from utils.evaluation.image_table import ImageTable
from utils.evaluation.metrics import LIKENESS, photo_similarity, real_similarity
from utils.evaluation.prompts import CLASS, PLACE, SUBJECT, class_prompt, dozen_words
from utils.evaluation.samples import BASELINE
from utils.models.check import FETCH

GET_CLIP = FETCH.format("openai/clip-vit-base-patch32", "clip-vit-base-patch32")
GET_DINO = FETCH.format("facebook/dino-vits16", "dino-vits16")
A_CLIP = f"a CLIP model: {GET_CLIP}, then --clip_model model/clip-vit-base-patch32"
NO_CLIP = f"needs {A_CLIP}"
NO_TEXT = f"needs CLIP's text tower, which no part of the pipeline holds: {A_CLIP}"
NO_DINO = f"needs a DINO model: {GET_DINO}, then --dino_model model/dino-vits16"
NO_PHOTOS = "needs your photos: --instance_data_dir"
TWO_PHOTOS = "needs two different photos or more"
NO_CLASS = "needs --class_name: whether CLIP knows such photos is not known without it"
FEW_PICTURES = "needs more pictures: --num_images"

TOLD_APART = 0.9  # of all pairs of a photo and a picture of the base's, in which the photo is more like the photos
CLASS_IS_FIRST = 0.75  # of the photos
NUM_ORDERS = 1000  # of photos and pictures, by chance, of which one in twenty is at least as far apart
LEAST_ORDERS = 20  # that there are: one of fewer is more than 5%


class Scorer(NamedTuple):
    """What may be said by an encoder.

    Attributes:
        encoder: of likeness: dino if there is one, else clip; "" without either.
        line: the sentence if it does not know such photos; "" if it does, or if that could not be tested.
        no_way, no_others: why nothing is said of how far the model has come, and of other prompts; "" if it may be.
    """

    encoder: str
    line: str
    no_way: str
    no_others: str

    @property
    def knows(self) -> bool:
        return not self.line


def test(table: ImageTable) -> Scorer:
    """Tests the encoder of likeness, and CLIP if it reads, on the photos and the base's pictures of the subject."""
    encoder = next((name for name in LIKENESS if name in table.images), "")
    class_name = table.samples["class_name"]
    if encoder not in table.photos:
        reason = NO_PHOTOS if encoder else NO_CLIP
        return Scorer(encoder, "", reason, reason)
    photos = table.photos[encoder]
    drawn = np.concatenate([table.rows(BASELINE, role).ravel() for role in (SUBJECT, PLACE, CLASS)])
    is_apart = are_told_apart(photos, table.images[encoder][drawn])
    is_first = None
    if table.text is not None and class_name:
        words = np.stack([table.text(class_prompt(word)) for word in dozen_words(class_name)])
        is_first = is_class_first(table.photos["clip"], words)
    if False in (is_apart, is_first):
        failed = table.names["clip" if is_first is False else encoder]
        return Scorer(encoder, f"This scorer, {failed}, does not know such photos: look at the pictures.", "", "")
    unread = "" if table.text is None or is_first else NO_CLASS
    few = TWO_PHOTOS if len(photos) < 2 else FEW_PICTURES
    return Scorer(encoder, "", few if is_apart is None else unread, NO_TEXT if table.text is None else unread)


def are_told_apart(photos: np.ndarray, pictures: np.ndarray) -> bool | None:
    """Whether photos [M,D] are clearly more like one another than the baseline's pictures [N,D] are like them, and
    more so than by chance; None if there are too few of either."""
    if len(photos) < 2 or math.comb(len(photos) + len(pictures), len(photos)) < LEAST_ORDERS:
        return None
    own, cosines = real_similarity(photos), photo_similarity(pictures, photos)
    if (own[:, None] > cosines[None, :]).mean() < TOLD_APART:
        return False
    both, draws = np.concatenate([photos, pictures]), np.random.default_rng(0)
    orders = [np.arange(len(both)), *(draws.permutation(len(both)) for _ in range(NUM_ORDERS))]
    gaps = np.array([_gap(both[order], len(photos)) for order in orders])
    return bool((gaps >= gaps[0] - 1e-12).mean() <= 0.05)


def _gap(rows: np.ndarray, num_photos: int) -> float:
    """How much more the first rows are like one another than the others are like them."""
    photos, pictures = rows[:num_photos], rows[num_photos:]
    return real_similarity(photos).mean() - photo_similarity(pictures, photos).mean()


def is_class_first(photos: np.ndarray, words: np.ndarray) -> bool:
    """Whether the first of the words [W,D] is the nearest to three of four photos [M,D]."""
    return bool(((photos @ words.T).argmax(axis=1) == 0).mean() >= CLASS_IS_FIRST)
