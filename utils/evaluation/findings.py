"""The shape of a verdict: checks and their states, and the choice of a model. checks.py and verdict.py fill it in."""

from dataclasses import dataclass

# The states of a check.
FOUND = "found"  # there, visible, and larger than its uncertainty
NOT_FOUND = "not found"  # looked for; these images rule a visible effect out
UNCERTAIN = "uncertain"  # looked for; too few images to tell
NOT_LOOKED_FOR = "not looked for"  # something that this needs was not there

# What a finding means: something is wrong, something is worth knowing, or what the training was for has been reached.
WARNING, NOTE, AIM = "warning", "note", "aim"

# The states of a whole verdict.
GOOD = "good"  # it draws the subject, and no warning was found
SPOILT = "spoilt"  # it draws the subject, and a warning was found
MISSED = "missed"  # it does not draw the subject
UNKNOWN = "unknown"  # whether it draws the subject could not be measured


@dataclass(frozen=True)
class Comparison:
    """A metric of a model beside the baseline's and the photos' own; None is what there is no value of.

    Attributes:
        metric: its key in metrics.json, such as clip_t_other.
        label: its name for people.
        visible: the smallest change that people see.
        interval: of the change, 95%; None with too few images.
    """

    metric: str
    label: str
    value: float
    baseline: float | None
    photos: float | None
    change: float | None
    interval: tuple[float, float] | None
    visible: float | None


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Attributes:
        kind: subject, prompt, blank, memorisation, collapse, drift, spread, class, or photos.
        level: what it means if it is found: WARNING, NOTE or AIM.
        state: FOUND, NOT_FOUND, UNCERTAIN or NOT_LOOKED_FOR.
        title: a few words that hold by themselves.
        text: plain sentences with the numbers; if it was not looked for, why not.
        advice: what to do about it, or how to have it looked for; "" if there is nothing to do.
        comparisons: the numbers in `text`, as values.
        files: the images that show it, if it shows in single ones.
    """

    kind: str
    level: str
    state: str
    title: str
    text: str
    advice: str = ""
    comparisons: tuple[Comparison, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about one model.

    Attributes:
        state: GOOD, SPOILT, MISSED or UNKNOWN.
        headline: one or two plain sentences without numbers.
        gaps: what is not known, in one plain sentence; "" if everything was looked for and could be told.
        checks: all of them, always in the same order.
    """

    state: str
    headline: str
    gaps: str
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Choice:
    """Which of several models to take.

    Attributes:
        model: its name in metrics.json; if none is good, the least bad one.
        is_good: whether it draws the subject and no warning was found on it.
        sentence: the choice in plain words.
        why: the rule and its numbers.
    """

    model: str
    is_good: bool
    sentence: str
    why: str
