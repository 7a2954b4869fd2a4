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
    y_ticks = ticks(min(ys), max(ys))
    x_scale, y_scale = scale(min(xs), max(xs), LEFT, RIGHT), scale(y_ticks[0], y_ticks[-1], BOTTOM, TOP)
    (start, first), (end, last) = (finite[[*finite][-1]][place] for place in (0, -1))
    drawn = []
    for style, points in finite.items():
        every = points[:: -(-len(points) // MAX_POINTS)]
        drawn.append((style, [(x_scale(x), y_scale(y)) for x, y in every], len(every) <= MAX_DOTS))
    label = f"{title}: from {short(first, 3)} at step {start:g} to {short(last, 3)} at {end:g}"
    marks = [(y_scale(y), short(y)) for y in y_ticks]
    return Chart(title, note, label, x_ticks(min(xs), max(xs)), marks, drawn)


def scale(low: float, high: float, first: int, last: int) -> Callable[[float], str]:
    """From [low, high] to the pixels [first, last]."""
    return lambda value: f"{first + (value - low) / ((high - low) or 1) * (last - first):.1f}"


def x_ticks(low: float, high: float) -> list[tuple[str, str, str]]:
    """The values below the chart; the last has the unit."""
    inside = [x for x in ticks(low, high, whole=True) if low <= x <= high]
    if len(inside) > 4:
        inside.pop(-2)  # room for the last one's unit
    place = scale(low, high, LEFT, RIGHT)
    marks = [(place(x), f"{x:g}", "middle") for x in inside]
    if marks:
        x, text, _ = marks[-1]
        marks[-1] = (x, f"step {text}", "end" if len(marks) > 1 else "middle")
    return marks


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to six round values that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 4.5)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def smooth(points: Points, weight: float = 0.95) -> Points:
    """Exponential moving average whose beginning is not pulled towards zero."""
    total, norm, result = 0.0, 0.0, []
    for x, y in (point for point in points if math.isfinite(point[1])):
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        result.append((x, total / norm))
    return result
