"""The DreamBooth paper's metrics as functions of matrices whose rows are unit vectors (docs/evaluation.md).

G [N,D]: generated images; R [M,D]: the photos; T [N,D]: the text of each image's prompt. Everything is float64.
"""

from typing import NamedTuple

import numpy as np

from utils.evaluation.prompts import CLASS, OTHER, SUBJECT


class Metric(NamedTuple):
    """How a mean over images is called, and what it is of.

    Attributes:
        column: each image's own value, or DIV by an encoder, each prompt's.
        role: of the prompts.
    """

    label: str
    meaning: str
    column: str
    role: str


METRICS = {  # by their keys in metrics.json, in the order of the page's table
    "dino": Metric("DINO", "likeness to your photos", "dino", SUBJECT),
    "clip_i": Metric("CLIP-I", "likeness to your photos", "clip_i", SUBJECT),
    "clip_t": Metric("CLIP-T", "likeness to the prompt, the subject's name left out", "clip_t", SUBJECT),
    "pres_dino": Metric("PRES (DINO)", "likeness of the bare class to your photos", "dino", CLASS),
    "pres_clip": Metric("PRES (CLIP)", "likeness of the bare class to your photos", "clip_i", CLASS),
    "div_dino": Metric("DIV (DINO)", "how much two seeds of a prompt differ", "div_dino", SUBJECT),
    "div_clip": Metric("DIV (CLIP)", "how much two seeds of a prompt differ", "div_clip", SUBJECT),
    "clip_t_other": Metric("CLIP-T, other things", "likeness to the prompt without the subject", "clip_t", OTHER),
}

LIKENESS = {"dino": ("dino", "DINO"), "clip": ("clip_i", "CLIP-I")}  # column and name, by encoder; the first speaks
# Ruiz et al., arXiv 2208.12242, table 1, over 30 subjects; by its encoders and its 25 prompts.
PAPER = {
    "real images": dict(dino=0.774, clip_i=0.885),
    "DreamBooth, Stable Diffusion": dict(dino=0.668, clip_i=0.803, clip_t=0.305),
    "Textual Inversion, Stable Diffusion": dict(dino=0.569, clip_i=0.780, clip_t=0.255),
}


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [N,D] scaled to length 1, in float64."""
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def photo_similarity(generated: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """[N]: each image's mean cosine to the photos. Its mean is CLIP-I, DINO or (on the class prompt) PRES."""
    return (generated @ photos.T).mean(axis=1)


def text_similarity(generated: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """[N]: each image's cosine to the text of its own prompt, unscaled. Its mean is CLIP-T."""
    return (generated * texts).sum(axis=1)


def real_similarity(photos: np.ndarray) -> np.ndarray:
    """[M]: each photo's mean cosine to the others, of which there must be one; its mean is REAL."""
    cosines = photos @ photos.T
    return (cosines.sum(axis=1) - np.diag(cosines)) / (len(photos) - 1)


def diversity(generated: np.ndarray) -> np.ndarray | None:
    """[P]: of each prompt's images [P,K,D] the mean of 1 - cosine over pairs, whose mean is DIV; None if K is 1."""
    num_images = generated.shape[1]
    if num_images < 2:
        return None
    cosines = np.einsum("pid,pjd->pij", generated, generated)
    first, second = np.triu_indices(num_images, 1)
    return 1 - cosines[:, first, second].mean(axis=1)
