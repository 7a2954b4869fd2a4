"""The DreamBooth paper's metrics as functions of matrices whose rows are unit vectors (docs/evaluation.md).

G [N,D]: generated images; R [M,D]: the photos; T [N,D]: the text of each image's prompt. Everything is float64.
"""

from collections.abc import Callable

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [N,D] scaled to length 1, in float64."""
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def photo_similarity(generated: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """[N]: each image's mean cosine to the photos. Its mean is CLIP-I, DINO or (on the class prompt) PRES."""
    return (generated @ photos.T).mean(axis=1)


def nearest_photo_similarity(generated: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """[N]: each image's cosine to the photo that it is nearest to. Its mean is COPY."""
    return (generated @ photos.T).max(axis=1)


def text_similarity(generated: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """[N]: each image's cosine to the text of its own prompt, unscaled. Its mean is CLIP-T."""
    return (generated * texts).sum(axis=1)


def real_similarity(photos: np.ndarray) -> float | None:
    """REAL: mean cosine of two different photos; None for a single photo."""
    num_photos = len(photos)
    if num_photos < 2:
        return None
    cosines = photos @ photos.T
    return float((cosines.sum() - np.trace(cosines)) / (num_photos * (num_photos - 1)))


def fellow_similarity(photos: np.ndarray) -> np.ndarray | None:
    """[M]: each photo's cosine to the other photo that it is nearest to; None for a single photo."""
    if len(photos) < 2:
        return None
    cosines = photos @ photos.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines.max(axis=1)


def real_nearest_similarity(photos: np.ndarray) -> float | None:
    """COPY among the photos: each one's cosine to the nearest other, averaged; None for a single photo."""
    fellows = fellow_similarity(photos)
    return None if fellows is None else float(fellows.mean())


def nearer_than_fellows(generated: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """[N] bool: whether an image is nearer to its nearest photo than that photo's fellow is; at least two photos."""
    cosines, fellows = generated @ photos.T, fellow_similarity(photos)
    assert fellows is not None, "at least two photos"
    return cosines.max(axis=1) > fellows[cosines.argmax(axis=1)]


def pair_distances(generated: np.ndarray) -> np.ndarray:
    """[P,K,K] of 1 - cosine between the K images of each prompt, from generated [P,K,D]."""
    return 1.0 - np.einsum("pid,pjd->pij", generated, generated)


def diversity(distances: np.ndarray) -> float | None:
    """DIV: the mean over prompts of the mean distance of two different images; None below two images a prompt."""
    num_images = distances.shape[1]
    if num_images < 2:
        return None
    first, second = np.triu_indices(num_images, 1)
    return float(distances[:, first, second].mean(axis=1).mean())


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float | None],
    num_prompts: int,
    num_seeds: int,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> list[float] | None:
    """Percentile interval of `statistic(prompt indices, seed indices)`, both drawn anew with replacement.

    The seeds are the same for every prompt, so prompts and seeds are drawn crosswise, not images alone. None where
    there is but one image to draw from, or where the statistic has no value on nine draws in ten.
    """
    if num_prompts * num_seeds < 2:
        return None
    draws = np.random.Generator(np.random.Philox(key=seed))
    values = []
    for _ in range(num_resamples):
        prompts = draws.integers(num_prompts, size=num_prompts)
        seeds = draws.integers(num_seeds, size=num_seeds)
        value = statistic(prompts, seeds)
        if value is not None:
            values.append(value)
    if len(values) < num_resamples // 10:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return [float(low), float(high)]


def mean_interval(values: np.ndarray, seed: int = 0) -> list[float] | None:
    """Bootstrap interval of the mean of values [P,K]."""
    num_prompts, num_seeds = values.shape
    return bootstrap_interval(
        lambda prompts, seeds: values[np.ix_(prompts, seeds)].mean(), num_prompts, num_seeds, seed
    )


def diversity_interval(distances: np.ndarray, seed: int = 0) -> list[float] | None:
    """Bootstrap interval of DIV from distances [P,K,K]; a seed drawn twice makes no pair with itself."""

    def statistic(prompts: np.ndarray, seeds: np.ndarray) -> float | None:
        first, second = np.triu_indices(len(seeds), 1)
        different = seeds[first] != seeds[second]
        if not different.any():
            return None
        pairs = distances[:, seeds[first[different]], seeds[second[different]]]
        return float(pairs[prompts].mean())

    num_prompts, num_seeds, _ = distances.shape
    return bootstrap_interval(statistic, num_prompts, num_seeds, seed)
