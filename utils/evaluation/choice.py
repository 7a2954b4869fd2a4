"""Which of several models to take: checkpoints, strengths, and the result itself.

The rule: of those that draw the subject, copy no photo, and follow other prompts no visibly worse than the baseline,
the nearest to the subject. If there is none, the best compromise: likeness gained less faithfulness lost, each in
differences that people see.
"""

from typing import NamedTuple

import numpy as np

from utils.evaluation.findings import FOUND, Choice, Comparison
from utils.evaluation.metrics import mean_interval
from utils.evaluation.samples import FINETUNED
from utils.evaluation.verdict import check_memorisation, compare, fidelity_metric, is_drawn, main_encoder
from utils.evaluation.wording import listed, number, signed


class Standing(NamedTuple):
    """One model's part in the choice.

    Attributes:
        faithfulness: to prompts without the subject; None if nothing could be measured.
        lost: of it, against the baseline; 0 if nothing could be measured.
        lost_at_most: the upper end of that difference's interval; None if there is none.
    """

    name: str
    likeness: Comparison
    faithfulness: Comparison | None
    lost: float
    lost_at_most: float | None
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

    @property
    def compromise(self) -> float:
        """Likeness gained less faithfulness lost, in differences that people see."""
        price = self.lost / visible(self.faithfulness) if self.faithfulness else 0.0
        return self.gained / visible(self.likeness) - price


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
        sentence = f"None of the {count} is good: {title(best.name)} is the best compromise."
        why = f"None draws your subject, copies no photo and keeps other prompts. {fidelity}{others}."
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
        most = max(-direction * bound for bound in other.interval) if other and other.interval else None
        copies = check_memorisation(metrics, name, main_encoder(metrics)).state == FOUND
        standings.append(Standing(name, likeness, other, lost, most, copies))
    return standings


def pick(standings: list[Standing]) -> tuple[Standing, bool]:
    """(the choice, whether it is fit) by the rule above."""
    fit = [standing for standing in standings if standing.is_fit]
    if fit:
        return max(fit, key=lambda standing: standing.gained), True
    sound = [standing for standing in standings if not standing.copies]
    return max(sound or standings, key=lambda standing: standing.compromise), False


def doubts(metrics: dict, best: Standing, standings: list[Standing]) -> list[str]:
    """Sentences on what these images are too few to tell about the choice."""
    found = []
    rivals = [s for s in standings if s is not best and (s.is_fit, s.copies) == (best.is_fit, best.copies)]
    near = [title(rival.name) for rival in rivals if not is_apart(metrics, best, rival)]
    if near:
        verb = "is" if len(near) == 1 else "are"
        found.append(f"As near, as far as these images can tell, {verb} {listed(near)}.")
    if best.is_fit and best.faithfulness is not None:
        if best.lost_at_most is None or best.lost_at_most >= visible(best.faithfulness):
            found.append("These images are too few to be sure that other prompts are kept.")
    return found


def is_apart(metrics: dict, one: Standing, other: Standing) -> bool:
    """Whether two models' likeness differs by more than its uncertainty, image by image (seeds are equal)."""
    values = metrics.get("image_values", {})
    if one.name not in values or other.name not in values:
        return True
    interval = mean_interval(np.asarray(values[one.name]) - np.asarray(values[other.name]))
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
