"""Which of several models to take: checkpoints, strengths, and the result itself.

The rule: of those that draw the subject, copy no photo, and follow other prompts no visibly worse than the baseline,
the nearest to the subject. If there is none, the best compromise: of those that copy no photo and keep nine tenths of
the largest gain in likeness, the one that has lost the least on other prompts.
"""

from typing import NamedTuple

import numpy as np

from utils.evaluation.checks import check_memorisation
from utils.evaluation.findings import FOUND, Choice, Comparison
from utils.evaluation.metrics import mean_interval, seeds_interval
from utils.evaluation.samples import FINETUNED
from utils.evaluation.visible import compare, fidelity_metric, is_drawn, main_encoder
from utils.evaluation.wording import listed, number, signed

KEPT_SHARE = 0.9  # of the largest gain in likeness, in a compromise


class Standing(NamedTuple):
    """One model's part in the choice.

    Attributes:
        faithfulness: to prompts without the subject; None if nothing could be measured.
        lost: of it, against the baseline; 0 if nothing could be measured.
        lost_interval: of that difference, 95%; None if there is none.
    """

    name: str
    likeness: Comparison
    faithfulness: Comparison | None
    lost: float
    lost_interval: tuple[float, float] | None
    copies: bool

    @property
    def gained(self) -> float:
        """Likeness, against the baseline."""
        assert self.likeness.change is not None, "standings_of leaves others out"
        return self.likeness.change

    @property
    def keeps_others(self) -> bool:
        """Whether other prompts are followed no visibly worse."""
        return self.faithfulness is None or self.lost < visible(self.faithfulness)

    @property
    def is_fit(self) -> bool:
        """Whether it draws the subject without visible harm."""
        return self.keeps_others and not self.copies and is_drawn(self.likeness)


def choose(metrics: dict) -> Choice | None:
    """The choice among the models of a metrics.json, or among its candidates if there are some.

    None if there is but one, or if likeness to the subject could not be measured.
    """
    if metrics.get("candidates"):
        said = metrics["candidates"]
        return Choice(said["chosen"], said["is_good"], said["sentence"], said["why"])
    standings = standings_of(metrics)
    if len(standings) < 2:
        return None
    best, is_good = pick(standings)
    count, others = len(standings), other_prompts_in_words(best)
    fidelity = f"{best.likeness.label} {number(best.likeness.value)}"
    if is_good:
        sentence = f"Take {title(best.name)}."
        why = f"Of the {count} it is the nearest to your subject ({fidelity}) among those that "
        why += f"{'copy no photo' if best.faithfulness is None else f'copy no photo and keep other prompts{others}'}."
    else:
        sentence = f"Take {title(best.name)}, the best compromise: none of the {count} {shortcoming(standings)}."
        why = f"Of those that keep most of the likeness it has lost the least on other prompts: {fidelity}{others}."
    return Choice(best.name, is_good, sentence, " ".join([why, *doubts(metrics, best, standings)]))


def faithfulness_metric(metrics: dict) -> tuple[str, int]:
    """(metric, direction that is good): how well prompts without the subject are followed, or else, without a text
    tower, how little the subject is seen in them."""
    if any("clip_t_other" in changes for changes in metrics["changes"].values()):
        return "clip_t_other", 1
    return f"{fidelity_metric(metrics)}_other", -1


def standings_of(metrics: dict) -> list[Standing]:
    """All models but the baseline whose likeness to the subject was measured."""
    key, direction = faithfulness_metric(metrics)
    standings = []
    for name in metrics["changes"]:
        likeness = compare(metrics, name, fidelity_metric(metrics), f"real_{main_encoder(metrics)}")
        if likeness is None or likeness.change is None:
            continue
        other = compare(metrics, name, key)
        other = other if other is not None and other.change is not None else None
        lost = -direction * (other.change or 0.0) if other else 0.0
        bounds = sorted(-direction * bound for bound in other.interval) if other and other.interval else None
        copies = check_memorisation(metrics, name, main_encoder(metrics)).state == FOUND
        standings.append(Standing(name, likeness, other, lost, (bounds[0], bounds[1]) if bounds else None, copies))
    return standings


def pick(standings: list[Standing]) -> tuple[Standing, bool]:
    """(the choice, whether it is fit) by the rule above."""
    fit = [standing for standing in standings if standing.is_fit]
    if fit:
        return max(fit, key=lambda standing: standing.gained), True
    return min(compromises(standings), key=lambda standing: (standing.lost, -standing.gained)), False


def compromises(standings: list[Standing]) -> list[Standing]:
    """Those that copy no photo, if there are such, and keep nine tenths of the largest gain in likeness."""
    sound = [standing for standing in standings if not standing.copies] or standings
    most = max(standing.gained for standing in sound)
    return [standing for standing in sound if standing.gained >= min(KEPT_SHARE * most, most)]


def shortcoming(standings: list[Standing]) -> str:
    """What none of them does."""
    drawn = [standing for standing in standings if is_drawn(standing.likeness)]
    if not drawn:
        return "draws your subject well"
    if all(standing.copies for standing in drawn):
        return "draws your subject without copying a photo"
    return "draws your subject and keeps other prompts as they were"


def doubts(metrics: dict, best: Standing, standings: list[Standing]) -> list[str]:
    """Sentences on what these images are too few to tell about the choice."""
    found = []
    rivals = [s for s in standings if s.is_fit] if best.is_fit else compromises(standings)
    part, word = ("likeness", "near") if best.is_fit else ("others", "good a compromise")
    equal = [title(s.name) for s in rivals if s is not best and not is_apart(metrics, part, best.name, s.name)]
    if equal:
        verb = "is" if len(equal) == 1 else "are"
        found.append(f"As {word}, as far as these images can tell, {verb} {listed(equal)}.")
    if best.faithfulness is not None and not best.copies:
        low, high = best.lost_interval or (-np.inf, np.inf)
        if best.is_fit and high >= visible(best.faithfulness):
            found.append("These images are too few to be sure that other prompts are kept.")
        if not best.keeps_others and low <= 0:
            found.append("These images are too few to be sure that other prompts have suffered at all.")
    return found


def is_apart(metrics: dict, part: str, one: str, other: str) -> bool:
    """Whether two models' likeness, or faithfulness ("others"), differs by more than its uncertainty."""
    ours, theirs = (metrics.get("image_values", {}).get(name, {}).get(part) for name in (one, other))
    if not ours or not theirs:
        return True
    difference = np.asarray(ours) - np.asarray(theirs)
    interval = mean_interval(difference) if part == "likeness" else seeds_interval(difference)
    return interval is not None and not interval[0] <= 0 <= interval[1]


def visible(comparison: Comparison) -> float:
    """The smallest difference in a metric that people see."""
    assert comparison.visible is not None, "every metric of the choice has one"
    return comparison.visible


def visible_in(standing: Standing) -> float:
    """The smallest difference in faithfulness that people see."""
    assert standing.faithfulness is not None
    return visible(standing.faithfulness)


def title(name: str) -> str:
    """A model's name in a sentence."""
    model, _, strength = name.partition("@")
    model = "the fine-tuned model" if model == FINETUNED else model
    return f"{model} at strength {strength}" if strength else model


def other_prompts_in_words(standing: Standing) -> str:
    """' (CLIP-T on other things 0.6, -0.01)', or nothing."""
    other = standing.faithfulness
    if other is None:
        return ""
    return f" ({other.label} {number(other.value)}, {signed(other.change or 0.0)} against the baseline)"
