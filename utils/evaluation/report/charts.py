"""Line charts, laid out in pixels at the size at which they are shown, so that their text is readable on a phone."""

import math
from collections.abc import Callable
from typing import NamedTuple

from utils.evaluation.wording import short

Points = list[tuple[float, float]]  # in order of x, the step
MAX_POINTS = 400  # of a longer curve every n-th is drawn: more points than pixels show nothing
MAX_DOTS = 20  # a curve of no more points than these shows each as a dot

LEFT, RIGHT, TOP, BOTTOM = 56, 308, 12, 166  # where the curves are in the 320 x 200 of chart.svg.jinja


class Chart(NamedTuple):
    """All that chart.svg.jinja needs; texts and pixels as SVG writes them.

    Attributes:
        label: what the curve shows, for those who cannot see it.
        x_ticks: (x, text, text-anchor).
        y_ticks: (y, text).
        curves: (CSS class, its points in pixels, whether each is a dot).
    """

    title: str
    note: str
    label: str
    x_ticks: list[tuple[str, str, str]]
    y_ticks: list[tuple[str, str]]
    curves: list[tuple[str, list[tuple[str, str]], bool]]


def line_chart(title: str, curves: dict[str, Points], note: str = "") -> Chart | None:
    """The chart of the curves, by CSS class, that have a finite point; None if none has one."""
    finite = {style: [point for point in points if math.isfinite(point[1])] for style, points in curves.items()}
    finite = {style: points for style, points in finite.items() if points}
    if not finite:
        return None
    xs, ys = zip(*(point for points in finite.values() for point in points), strict=True)
    x_scale, y_scale = scale(min(xs), max(xs), LEFT, RIGHT), scale(min(ys), max(ys), BOTTOM, TOP)
    (start, first), (end, last) = (finite[[*finite][-1]][place] for place in (0, -1))
    drawn = []
    for style, points in finite.items():
        every = points[:: -(-len(points) // MAX_POINTS)]
        drawn.append((style, [(x_scale(x), y_scale(y)) for x, y in every], len(every) <= MAX_DOTS))
    label = f"{title}: from {short(first, 3)} at step {start:g} to {short(last, 3)} at {end:g}"
    x_ticks = [(x_scale(min(xs)), f"{min(xs):g}", "start"), (x_scale(max(xs)), f"step {max(xs):g}", "end")]
    y_ticks = [(y_scale(y), short(y, 3)) for y in sorted({min(ys), max(ys)})]
    return Chart(title, note, label, x_ticks if max(xs) > min(xs) else x_ticks[1:], y_ticks, drawn)


def scale(low: float, high: float, first: int, last: int) -> Callable[[float], str]:
    """From [low, high] to the pixels [first, last]."""
    return lambda value: f"{first + (value - low) / ((high - low) or 1) * (last - first):.1f}"


def smooth(points: Points, weight: float = 0.95) -> Points:
    """Exponential moving average whose beginning is not pulled towards zero."""
    total, norm, result = 0.0, 0.0, []
    for x, y in (point for point in points if math.isfinite(point[1])):
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        result.append((x, total / norm))
    return result
