"""Line charts as inline SVG, drawn at the size at which they are shown, so that their text is readable on a phone."""

import math
from typing import NamedTuple

from utils.evaluation.report.html import Markup, tag

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 30
MAX_POINTS = 400  # a longer curve is thinned: more points than pixels show nothing


class Series(NamedTuple):
    """A curve: (x, y) points in order of x, a CSS class, and (x, low, high) intervals."""

    points: list[tuple[float, float]]
    style: str
    intervals: list[tuple[float, float, float]] = []


def line_chart(title: str, series: list[Series], note: str = "", x_label: str = "step") -> Markup:
    """A figure with a title, the chart and a line of explanation."""
    series = [Series(thin(finite(s.points)), s.style, s.intervals) for s in series]
    points = [point for s in series for point in s.points]
    if not points:
        return Markup()
    bounds = [y for s in series for _, low, high in s.intervals for y in (low, high)]
    ys = ticks(min([y for _, y in points] + bounds), max([y for _, y in points] + bounds))
    xs = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    place = Place((min(x for x, _ in points), max(x for x, _ in points)), (ys[0], ys[-1]))
    parts = [grid(place, xs, ys, x_label)]
    for s in series:
        parts += [whisker(place, *interval) for interval in s.intervals]
        path = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in s.points)
        parts.append(tag("polyline", points=path, class_=f"line {s.style}"))
        if len(s.points) <= 20:
            parts += [tag("circle", cx=f"{place.x(x):.1f}", cy=f"{place.y(y):.1f}", r="3") for x, y in s.points]
    last = series[-1].points
    label = f"{title}: from {last[0][1]:.3g} at {x_label} {last[0][0]:g} to {last[-1][1]:.3g} at {last[-1][0]:g}"
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    caption = tag("figcaption", tag("strong", title), " ", tag("span", note) if note else "")
    return tag("figure", caption, svg, class_="chart")


class Place(NamedTuple):
    """From values to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)


def grid(place: Place, xs: list[float], ys: list[float], x_label: str) -> list[Markup]:
    """Horizontal lines with their values, and the values below."""
    parts = []
    for y in ys:
        height = f"{place.y(y):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="rule"))
        parts.append(tag("text", f"{y:.4g}", x=LEFT - 6, y=height, class_="y-label"))
    inside = [x for x in xs if place.x_range[0] <= x <= place.x_range[1]]
    if len(inside) > 4:
        inside.pop(-2)  # room for the last one's unit
    for number, x in enumerate(inside):
        text = f"{x_label} {x:g}" if number == len(inside) - 1 else f"{x:g}"
        anchor = "end" if number == len(inside) - 1 and number else "middle"
        parts.append(tag("text", text, x=f"{place.x(x):.1f}", y=HEIGHT - 10, class_="x-label", text_anchor=anchor))
    return parts


def whisker(place: Place, x: float, low: float, high: float) -> Markup:
    """An interval as an upright line."""
    across, top, bottom = (f"{value:.1f}" for value in (place.x(x), place.y(high), place.y(low)))
    return tag("line", x1=across, x2=across, y1=top, y2=bottom, class_="whisker")


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to six round values that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 4.5)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def finite(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS, each the mean of consecutive ones."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def smooth(points: list[tuple[float, float]], weight: float = 0.95) -> list[tuple[float, float]]:
    """Exponential moving average whose beginning is not pulled towards zero."""
    total, norm, result = 0.0, 0.0, []
    for x, y in finite(points):
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        result.append((x, total / norm))
    return result
