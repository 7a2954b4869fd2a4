"""Intervals by plain Student-like widths: a placeholder for the ones whose coverage is simulated."""

import math
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    low: float
    high: float
    unit: str


class Way(NamedTuple):
    value: float
    low: float
    high: float
    unit: str


def share(k: int, n: int) -> tuple[float, float]:
    half = 2 * math.sqrt(max(k / n * (1 - k / n), 0.05) / n)
    return max(0.0, k / n - half), min(1.0, k / n + half)


def mean_change(values: np.ndarray, num_looks: int = 1) -> Interval | None:
    unit = "prompts" if len(values) > 4 else "images"
    flat = values.mean(axis=1) if unit == "prompts" else values.ravel()
    if len(flat) < 2:
        return None
    half = 3 * flat.std(ddof=1) / math.sqrt(len(flat))
    return Interval(float(flat.mean() - half), float(flat.mean() + half), unit)


def share_of_way(model: np.ndarray, base: np.ndarray, photos: np.ndarray) -> Way | None:
    whole, found = photos.mean() - base.mean(), mean_change(model - base)
    if found is None or whole <= 0:
        return None
    return Way((model - base).mean() / whole, found.low / whole, found.high / whole, found.unit)


def describe_change(values: np.ndarray) -> dict:
    found, value = mean_change(values), float(values.mean())
    if found is None:
        return dict(value=value, interval=None, unit=None, text="cannot be told from so few")
    text = f"changed by less than {max(-found.low, found.high):.3f}"
    text = f"rose by {value:.3f}" if found.low > 0 else f"fell by {-value:.3f}" if found.high < 0 else text
    return dict(value=value, interval=[found.low, found.high], unit=found.unit, text=text)


def not_worse_than_best(values: np.ndarray) -> np.ndarray:
    means, own = values.mean(axis=1), values - values.mean(axis=0)
    return means >= means.max() - 2.5 * own.std() * math.sqrt(2 / values.shape[1])
