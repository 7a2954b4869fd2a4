"""Line charts, laid out in pixels at the size at which they are shown, so that their text is readable on a phone."""

import math
from typing import NamedTuple

from utils.evaluation.wording import short

MAX_POINTS = 400  # of a longer curve every n-th is drawn: more points than pixels show nothing
MAX_DOTS = 20  # a curve of no more points than these shows each as a dot


class Series(NamedTuple):
    """A curve: (x, y) points in order of x, a CSS class, and (x, low, high) intervals."""

    points: list[tuple[float, float]]
    style: str
    intervals: list[tuple[float, float, float]] = []


class Frame(NamedTuple):
    """A chart's size in pixels, and where within it the curves are."""

    width: int = 360
    height: int = 200
    left: int = 48
    right: int = 348
    top: int = 12
    bottom: int = 170


class Curve(NamedTuple):
    """A series in pixels, written as SVG writes them."""

    style: str
    points: str
    dots: list[tuple[str, str]]  # (x, y)
    whiskers: list[tuple[str, str, str]]  # (x, top, bottom)


class Chart(NamedTuple):
    """All that chart.svg.jinja needs."""

    title: str
    note: str
    label: str  # what the curve shows, for those who cannot see it
    x_ticks: list[tuple[str, str, str]]  # (x, text, text-anchor)
    y_ticks: list[tuple[str, str]]  # (y, text)
    curves: list[Curve]
    frame: Frame = Frame()


def line_chart(title: str, series: list[Series], note: str = "") -> Chart | None:
    """The chart of all series that have a finite point; None if no series has one."""
    series = [Series(finite(s.points), s.style, s.intervals) for s in series]
    points = [point for s in series for point in s.points]
    if not points:
        return None
    ys = ticks(*view([y for _, y in points], [y for s in series for _, low, high in s.intervals for y in (low, high)]))
    x_range = (min(x for x, _ in points), max(x for x, _ in points))
    place = Place(x_range, (ys[0], ys[-1]))
    last = series[-1].points
    return Chart(
        title=title,
        note=note,
        label=f"{title}: from {short(last[0][1], 3)} at step {last[0][0]:g} "
        f"to {short(last[-1][1], 3)} at {last[-1][0]:g}",
        x_ticks=x_ticks(place),
        y_ticks=[(place.y(y), short(y)) for y in ys],
        curves=[curve(place, s) for s in series],
    )


class ScatterPoint(NamedTuple):
    """A point, the text beside it, and its intervals."""

    x: float
    y: float
    text: str
    is_chosen: bool
    x_interval: tuple[float, float] | None
    y_interval: tuple[float, float] | None


class Dot(NamedTuple):
    """A point in pixels."""

    x: str
    y: str
    text: str
    is_chosen: bool
    whiskers: list[tuple[str, str, str, str]]  # (x1, y1, x2, y2)


class Line(NamedTuple):
    """A line across the chart, and where its text stands, in pixels."""

    y: str
    text: str
    style: str
    text_y: str


class Scatter(NamedTuple):
    """All that scatter.svg.jinja needs."""

    label: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[str, str]]  # (x, text)
    y_ticks: list[tuple[str, str]]
    dots: list[Dot]  # the chosen one last, so that nothing covers it
    lines: list[Line]
    frame: Frame


SCATTER_FRAME = Frame(width=460, height=340, left=48, right=444, top=34, bottom=284)


def scatter_chart(
    points: list[ScatterPoint], lines: list[tuple[float, str, str]], x_label: str, y_label: str
) -> Scatter:
    """The points, and a line across the chart at every (y, text, CSS class), the highest first."""
    x_ticks = ticks(*view([point.x for point in points], [x for point in points for x in point.x_interval or ()]))
    ys = [*(point.y for point in points), *(y for y, *_ in lines)]
    y_ticks = ticks(*view(ys, [y for point in points for y in point.y_interval or ()]))
    place = Place((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), SCATTER_FRAME)
    listed = ", ".join(f"{point.text} at {short(point.x, 3)} and {short(point.y, 3)}" for point in points)
    return Scatter(
        label=f"{x_label} and {y_label}: {listed}",
        x_label=x_label,
        y_label=y_label,
        x_ticks=[(place.x(x), short(x)) for x in x_ticks],
        y_ticks=[(place.y(y), short(y)) for y in y_ticks],
        dots=[dot(place, point) for point in sorted(points, key=lambda point: point.is_chosen)],
        lines=[line(place, *each, is_first=each is lines[0]) for each in lines],
        frame=SCATTER_FRAME,
    )


def line(place: "Place", y: float, text: str, style: str, *, is_first: bool) -> Line:
    """The text of the first stands above its line, those of others below theirs."""
    height = place.y(y)
    return Line(height, text, style, f"{float(height) + (-5 if is_first else 13):.1f}")


def dot(place: "Place", point: ScatterPoint) -> Dot:
    x, y = place.x(point.x), place.y(point.y)
    whiskers = [(place.x(end), y, x, y) for end in point.x_interval or ()]
    whiskers += [(x, place.y(end), x, y) for end in point.y_interval or ()]
    return Dot(x, y, point.text, point.is_chosen, whiskers)


class Place(NamedTuple):
    """From values to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    frame: Frame = Frame()

    def x(self, value: float) -> str:
        low, high = self.x_range
        value = min(max(value, low), high)  # an interval may reach beyond
        width = self.frame.right - self.frame.left
        return f"{self.frame.left + (value - low) / ((high - low) or 1) * width:.1f}"

    def y(self, value: float) -> str:
        low, high = self.y_range
        value = min(max(value, low), high)
        height = self.frame.bottom - self.frame.top
        return f"{self.frame.bottom - (value - low) / ((high - low) or 1) * height:.1f}"


def curve(place: Place, series: Series) -> Curve:
    """The series in pixels."""
    every = -(-len(series.points) // MAX_POINTS)
    points = [(place.x(x), place.y(y)) for x, y in series.points[::every]]
    return Curve(
        style=series.style,
        points=" ".join(f"{x},{y}" for x, y in points),
        dots=points if len(points) <= MAX_DOTS else [],
        whiskers=[(place.x(x), place.y(high), place.y(low)) for x, low, high in series.intervals],
    )


def x_ticks(place: Place) -> list[tuple[str, str, str]]:
    """The values below the chart; the last has the unit."""
    low, high = place.x_range
    inside = [x for x in ticks(low, high, whole=True) if low <= x <= high]
    if len(inside) > 4:
        inside.pop(-2)  # room for the last one's unit
    marks = [(place.x(x), f"{x:g}", "middle") for x in inside]
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


def view(values: list[float], ends: list[float]) -> tuple[float, float]:
    """The range that a chart shows: all values, and of their intervals' ends what lies within one such range of it."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    return max(low - span, min([low, *ends])), min(high + span, max([high, *ends]))


def finite(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]


def smooth(points: list[tuple[float, float]], weight: float = 0.95) -> list[tuple[float, float]]:
    """Exponential moving average whose beginning is not pulled towards zero."""
    total, norm, result = 0.0, 0.0, []
    for x, y in finite(points):
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        result.append((x, total / norm))
    return result
