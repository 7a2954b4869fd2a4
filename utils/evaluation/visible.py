"""Whether a change of a metric is visible, and larger than its uncertainty.

A thing is found if it is visible (of at least the size in VISIBLE) and larger than its uncertainty (its 95% interval
leaves zero out); it is not found if the interval leaves no room for a visible size. docs/evaluation.md gives the
measurements on which the sizes rest.
"""

from utils.evaluation.findings import FOUND, NOT_FOUND, UNCERTAIN, Comparison
from utils.evaluation.samples import BASELINE
from utils.evaluation.wording import LABELS, change_in_words, number

# The smallest changes that people see, by what the metric's key begins with.
VISIBLE = {"clip_t": 0.05, "clip_i": 0.05, "pres_clip": 0.05, "dino": 0.1, "pres_dino": 0.1}
DRAWN_SHARE = 0.5  # of the way from the baseline to the photos' own likeness: the subject is drawn


def main_encoder(metrics: dict) -> str:
    """dino if its numbers are there, as in the paper, else clip."""
    return "dino" if metrics["encoders"]["dino"] is not None else "clip"


def fidelity_metric(metrics: dict) -> str:
    """The metric that speaks for subject fidelity."""
    return "dino" if main_encoder(metrics) == "dino" else "clip_i"


def compare(metrics: dict, model: str, key: str, photos: str = "") -> Comparison | None:
    """A metric beside the baseline's and the photos' own; None if it has no value."""
    ours, baseline = (metrics["models"][name].get(key, {}).get("value") for name in (model, BASELINE))
    if ours is None:
        return None
    change = metrics["changes"][model].get(key, {})
    interval = change.get("interval")
    return Comparison(
        metric=key,
        label=LABELS[key],
        value=ours,
        baseline=baseline,
        photos=metrics["photos"].get(photos, {}).get("value"),
        change=change.get("value"),
        interval=(interval[0], interval[1]) if interval else None,
        visible=next((size for start, size in VISIBLE.items() if key.startswith(start)), None),
    )


def effect(comparison: Comparison, direction: int) -> str:
    """Whether the metric went up (direction 1) or down (-1): FOUND, NOT_FOUND or UNCERTAIN."""
    change, interval, visible = comparison.change, comparison.interval, comparison.visible
    if change is None or interval is None or visible is None:
        return UNCERTAIN
    low, high = sorted(direction * bound for bound in interval)
    if direction * change >= visible and low > 0:
        return FOUND
    return NOT_FOUND if high < visible else UNCERTAIN


def in_words(comparison: Comparison) -> str:
    """'DINO went from 0.1 to 0.2 (+0.1, 95% interval ...)', without a full stop."""
    if comparison.baseline is None or comparison.change is None:
        return f"{comparison.label} is {number(comparison.value)}"
    change = change_in_words(comparison.change, comparison.interval)
    return f"{comparison.label} went from {number(comparison.baseline)} to {number(comparison.value)} ({change})"


def is_drawn(comparison: Comparison) -> bool:
    """Whether a found subject has come at least half of the way to the photos' own likeness, if that is known."""
    if comparison.photos is None or comparison.baseline is None:
        return True
    return comparison.value - comparison.baseline >= DRAWN_SHARE * (comparison.photos - comparison.baseline)


def is_like_photos(comparison: Comparison) -> bool:
    """Whether the value is not visibly below the photos' own, if they have one."""
    assert comparison.visible is not None
    return comparison.photos is not None and comparison.value > comparison.photos - comparison.visible
