"""The DreamBooth paper's metrics as functions of matrices whose rows are unit vectors (docs/evaluation.md).

G [N,D]: generated images; R [M,D]: the photos; T [N,D]: the text of each image's prompt. Everything is float64.
"""

import functools
import math

import numpy as np

CONFIDENCE = 0.95
MOST_PROMPTS_OF_TWO = 4  # with two images each: two seeds do not tell what a seed adds, and it weighs more
LEAST_SEEDS_PART = 1.25  # of an image's own variance, for the seeds' part to be counted
SAME_PHOTO = 0.995  # cosine: between one photo saved twice (0.9995 or more) and two photos of a subject (0.988)


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


def distinct(photos: np.ndarray) -> np.ndarray:
    """The photos less those that are there already, saved once more in another quality or size, say."""
    kept: list[int] = []
    for row, photo in enumerate(photos):
        if not np.any(photos[kept] @ photo >= SAME_PHOTO):
            kept.append(row)
    return photos[kept]


def nearest_other_similarity(photos: np.ndarray) -> np.ndarray | None:
    """[M]: each photo's cosine to the other photo that it is nearest to; None for a single photo."""
    if len(photos) < 2:
        return None
    cosines = photos @ photos.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines.max(axis=1)


def real_nearest_similarity(photos: np.ndarray) -> float | None:
    """COPY among the photos: each one's cosine to the nearest other, averaged; None for a single photo.

    A photo that is there twice counts once.
    """
    nearest = nearest_other_similarity(distinct(photos))
    return None if nearest is None else float(nearest.mean())


def nearer_than_photos(generated: np.ndarray, photos: np.ndarray) -> np.ndarray | None:
    """[N] bool: whether an image is nearer to its nearest photo than that photo's nearest other photo is.

    A photo that is there twice counts once; None for a single photo.
    """
    photos = distinct(photos)
    cosines, nearest = generated @ photos.T, nearest_other_similarity(photos)
    return None if nearest is None else cosines.max(axis=1) > nearest[cosines.argmax(axis=1)]


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


def mean_interval(values: np.ndarray) -> list[float] | None:
    """95% interval of the mean of values [P,K]: prompts and seeds like these, or other seeds if there is one prompt.

    Student's t. Values are a sum of what a prompt adds, what a seed adds (all prompts have the same seeds), and what
    is the image's own: a crossed two-way layout (Scheffe, The Analysis of Variance, 1959, chapter 7), with
    Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). None if the seeds' part cannot be told: one image
    a prompt, or two of many prompts. docs/evaluation.md has the coverage, on which the constants rest.
    """
    num_prompts, num_seeds = values.shape
    if num_seeds < 2 or (num_seeds == 2 and num_prompts > MOST_PROMPTS_OF_TWO):
        return None
    if num_prompts == 1:
        return student_interval(values[0])
    mean, of_prompt, of_seed = values.mean(), values.mean(axis=1), values.mean(axis=0)
    freedoms = np.array([num_prompts - 1, num_seeds - 1, (num_prompts - 1) * (num_seeds - 1)])
    own = values - of_prompt[:, None] - of_seed[None, :] + mean
    squares = np.array(
        [num_seeds * ((of_prompt - mean) ** 2).sum(), num_prompts * ((of_seed - mean) ** 2).sum(), (own**2).sum()]
    )
    squares /= freedoms
    if num_prompts > 2 and squares[1] > LEAST_SEEDS_PART * squares[2]:
        variance, parts = squares[0] + squares[1] - squares[2], squares**2 / freedoms
        degrees = max(variance**2 / parts.sum(), min(num_prompts, num_seeds) - 1)
    else:
        variance, degrees = squares[0], num_prompts - 1
    half = t_quantile(degrees) * math.sqrt(variance / values.size)
    return [float(mean) - half, float(mean) + half]


def seeds_interval(values: np.ndarray) -> list[float] | None:
    """95% interval of the mean of values [P,K] for other seeds of these very prompts; None for one image a prompt."""
    return student_interval(values.mean(axis=0))


def student_interval(values: np.ndarray, num_looks: int = 1) -> list[float] | None:
    """Student's 95% interval of the mean of independent values [K]; None for one value.

    Args:
        num_looks: how many such intervals are looked at together, all of which shall hold (Bonferroni).
    """
    if len(values) < 2:
        return None
    share = 1 - (1 - CONFIDENCE) / 2 / num_looks
    half = t_quantile(len(values) - 1, share) * math.sqrt(values.var(ddof=1) / len(values))
    return [float(values.mean()) - half, float(values.mean()) + half]


def t_quantile(degrees: float, share: float = 1 - (1 - CONFIDENCE) / 2) -> float:
    """The quantile of Student's t; between whole degrees of freedom on a straight line."""
    lower = math.floor(degrees)
    low = _whole_t_quantile(lower, share)
    return low if degrees == lower else low + (degrees - lower) * (_whole_t_quantile(lower + 1, share) - low)


@functools.cache
def _whole_t_quantile(degrees: int, share: float) -> float:
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_share(middle, degrees) < share else (low, middle)
    return (low + high) / 2


def _t_share(t: float, degrees: int) -> float:
    """How much of Student's t lies below `t`: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, is_odd = math.cos(angle), degrees % 2
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for number in range(3 if is_odd else 2, degrees - 1, 2):
        term *= (number - 1) / number * cosine**2
        total += term
    total *= math.sin(angle)
    return 0.5 + (angle + total) / math.pi if is_odd else 0.5 + total / 2


def pseudo_values(distances: np.ndarray) -> np.ndarray | None:
    """[P,K]: what each image adds to the mean distance of its prompt, from distances [P,K,K]; their mean is DIV.

    Tukey's pseudo-values, K times the mean over all pairs less K - 1 times the mean over the pairs without the image,
    whose mean has the interval of a mean (Arvesen, Annals of Mathematical Statistics 40, 1969). None below three
    images a prompt.
    """
    num_images = distances.shape[1]
    if num_images < 3:
        return None
    to_others = distances.sum(axis=2) - np.einsum("pii->pi", distances)
    total = to_others.sum(axis=1, keepdims=True)
    whole = total / (num_images * (num_images - 1))
    without = (total - 2 * to_others) / ((num_images - 1) * (num_images - 2))
    return num_images * whole - (num_images - 1) * without


def diversity_interval(distances: np.ndarray) -> list[float] | None:
    """95% interval of DIV from distances [P,K,K]; None below three images a prompt."""
    values = pseudo_values(distances)
    return None if values is None else mean_interval(values)


def real_interval(photos: np.ndarray) -> list[float] | None:
    """95% interval of REAL, for photos like these; None below three photos."""
    interval = diversity_interval(pair_distances(photos[None]))
    return None if interval is None else [1 - interval[1], 1 - interval[0]]
