"""What can be said of a count, of a change, of how far, and of the best: 95% intervals that hold what they say.

bench/sentences.py simulates each. Values are [P,K]: K images of each of P prompts, with seeds of their own. The unit
is the prompt; with MOST_FIXED prompts or fewer it is the image, and an interval is of these very prompts.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
MOST_FIXED = 4  # prompts: fewer than five tell nothing of other prompts
LEAST_PROMPTS, LEAST_IMAGES = 25, 100  # for the mean of changes of any shape; with fewer, a rare one is not yet seen
WIDER, WIDER_OF_FEW = 1.15, 1.5  # looks in the place of one: what skewed and rare changes take from Student's t
MOST_DRAWS, MOST_VALUES = 40_000, 4_000_000  # for the quantile of Hsu's comparison, known to 0.01 with few images
UNKNOWN = "cannot be told from so few"


class Interval(NamedTuple):
    """Of a mean; its unit is prompts or images."""

    low: float
    high: float
    unit: str


class Way(NamedTuple):
    """From the base's pictures, 0, to the photos, 1."""

    value: float
    low: float
    high: float
    unit: str


def share(count: float, number: int) -> tuple[float, float]:
    """Exact interval of a share (Clopper and Pearson, Biometrika 26, 1934)."""
    tail = (1 - LEVEL) / 2
    low = beta_quantile(tail, count, number - count + 1) if count > 0 else 0.0
    return low, beta_quantile(1 - tail, count + 1, number - count) if count < number else 1.0


def mean_change(values: np.ndarray, are_means: bool = False) -> Interval | None:
    """Of the mean of changes [P,K], whether normal, skewed, bounded or rare among images; None of too few.

    Student's, less half of what skewness adds (Hall, Journal of the Royal Statistical Society B 54, 1992): with rare
    changes none is too little and all of it too much.

    Args:
        are_means: values are means of many images themselves.
    """
    units, unit = _units(values)
    if len(units) < LEAST_PROMPTS or (values.size < LEAST_IMAGES and not are_means):
        return None
    low, high = (units.mean() - units.std(ddof=1) * margin for margin in _margins(units, WIDER))
    return Interval(float(low), float(high), unit)


def _margins(units: np.ndarray, looks: float, skewed: float = 0.5) -> list[float]:
    """How many deviations the mean may be above and below the true one; `skewed`: the share of skewness that counts.

    Each solves t + g t^2 / 3 + g^2 t^3 / 27 + g / 6n = +-Student's, with the skewness g.
    """
    half = t_quantile(len(units) - 1, looks) / math.sqrt(len(units))
    deviation = units.std()
    skewness = skewed * ((units - units.mean()) ** 3).mean() / deviation**3 if deviation else 0.0
    if abs(skewness) < 1e-6:
        return [half, -half]
    ends = (half - skewness / (6 * len(units)), -half - skewness / (6 * len(units)))
    return [3 / skewness * (float(np.cbrt(1 + skewness * end)) - 1) for end in ends]


def has_risen(values: np.ndarray, num_looks: int = 1) -> bool | None:
    """Whether changes [P,K] have risen, which are as likely up as down if nothing has (Student's t); None for one.

    Args:
        num_looks: how many are looked at together, none of which shall rise by chance (Bonferroni).
    """
    units, _ = _units(values)
    if len(units) < 2:
        return None
    return bool(units.mean() > t_quantile(len(units) - 1, num_looks) * units.std(ddof=1) / math.sqrt(len(units)))


def share_of_way(model: np.ndarray, base: np.ndarray, photos: np.ndarray) -> Way | None:
    """(model - base) / (photos - base) of likenesses [P,K] with the same seeds (Fieller, 1954; skewness as above).

    The photos' likenesses [M] are these photos', not of others like them. None if the base's are not told from them.
    Of fewer than LEAST_IMAGES also None unless all have come nearer, and by more than chance: one picture in ten that
    shows the subject at last is not seen among four.
    """
    changes, unit = _units(model - base)
    if len(changes) < 2:
        return None
    ways, few = _units(photos.mean() - base)[0], model.size < LEAST_IMAGES
    change, way = changes.mean(), ways.mean()
    if way <= 0 or (few and changes.min() <= 0):
        return None
    covariance, ends = np.cov(changes, ways), []
    looks, skewed = (WIDER_OF_FEW, 0.0) if few else (WIDER, 0.5)
    for margin in _margins(changes - change / way * ways, looks, skewed):
        (of_change, of_both), (_, of_way) = covariance * margin**2
        square, middle, rest = way**2 - of_way, change * way - of_both, change**2 - of_change
        if square <= 0:
            return None
        root = math.sqrt(max(middle**2 - square * rest, 0.0))
        ends.append(float((middle - math.copysign(root, margin)) / square))
    low, high = ends
    return None if few and low <= 0 else Way(float(change / way), low, high, unit)


def describe_change(values: np.ndarray) -> dict:
    """The mean of changes [P,K] in one of three forms: rose or fell by, smaller than, cannot be told from so few."""
    found, value = mean_change(values), float(values.mean())
    if found is None:
        units, unit = _units(values)
        counted = f"; up in {int((units > 0).sum())} of {len(units)} {unit}"
        return dict(value=value, interval=None, unit=None, text=UNKNOWN + counted)
    low, high, unit = found
    if low <= 0 <= high:
        text = f"changed by less than {max(-low, high):.3f}"
    else:
        nearer, further = sorted((abs(low), abs(high)))
        text = f"{'rose' if low > 0 else 'fell'} by {abs(value):.3f} (95%: {nearer:.3f} to {further:.3f})"
    return dict(value=value, interval=[low, high], unit=unit, text=text)


def not_worse_than_best(values: np.ndarray) -> np.ndarray:
    """[C] of values [C,N], the same N images of C candidates: which may be the best (Hsu, Ann. Statist. 9, 1981).

    The best is among them in 95%. A difference has the variance of its own images, since neighbours are more alike.
    """
    number, num_images = values.shape
    if num_images < 2 or number < 2:
        return np.ones(number, bool)
    differences = values[None] - values[:, None]
    errors = differences.std(axis=2, ddof=1) / math.sqrt(num_images)
    return (differences.mean(axis=2) <= _hsu_quantile(number, num_images - 1) * errors).all(axis=1)


@functools.cache
def _hsu_quantile(number: int, degrees: int) -> float:
    """How far the best of equals is exceeded by others, in standard errors; two thirds of the rest are skewness's."""
    draws = np.random.Generator(np.random.Philox(key=number))
    num_draws = min(MOST_DRAWS, MOST_VALUES // (number * (degrees + 1)))
    values = draws.normal(size=(num_draws, number, degrees + 1))
    differences = values[:, 1:] - values[:, :1]
    errors = differences.std(axis=2, ddof=1) / math.sqrt(degrees + 1)
    return float(np.quantile((differences.mean(axis=2) / errors).max(axis=1), 1 - (1 - LEVEL) / 3))


def _units(values: np.ndarray) -> tuple[np.ndarray, str]:
    """The prompts' means, or the images of few prompts."""
    return (values.mean(axis=1), "prompts") if len(values) > MOST_FIXED else (values.ravel(), "images")


def t_quantile(degrees: int, num_looks: float = 1) -> float:
    """What Student's t stays within in 95%, or in so much more that `num_looks` of them do."""
    share_of_beta = beta_quantile((1 - LEVEL) / num_looks, degrees / 2, 0.5)
    return math.sqrt(degrees * (1 / share_of_beta - 1))


@functools.cache
def beta_quantile(probability: float, a: float, b: float) -> float:
    """The quantile of the beta distribution, to 1e-15 of its range."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_share(middle, a, b) < probability else (low, middle)
    return high


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Abramowitz and Stegun 26.5.8)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_share(1 - x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    rest = 0.0
    for term in range(200, 0, -1):
        half = term // 2
        above = half * (b - half) if term % 2 == 0 else -(a + half) * (a + b + half)
        rest = above * x / ((a + term - 1) * (a + term)) / (1 + rest)
    return math.exp(front) / a / (1 + rest)
