"""--choose: which of the candidates to take, by pictures that are drawn quickly for this alone.

A candidate is taken if its pictures are found nearer to the photos than the baseline's, by a scorer that knows such
photos, none of them is a photo again, and other prompts are kept, if they could be measured. Of those that cannot be
told from the best (Hsu) it is the one nearest to the baseline. Its numbers are of pictures that it was not chosen by.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.evaluation import intervals
from utils.evaluation.candidates import NUM_TELLING, distance, export_command, label
from utils.evaluation.image_table import ImageTable
from utils.evaluation.prompts import SUBJECT
from utils.evaluation.samples import BASELINE
from utils.evaluation.scorer import LIKENESS, Scorer
from utils.evaluation.sentences import count_kept, way_in_words, way_of
from utils.evaluation.wording import listed
from utils.files.ownership import run_of

TAKE, NONE, LOOK = "take", "none", "look"  # the answers
LOOK_AT = "These pictures cannot tell which to use: look at them."
LOSES, COPIES = "loses other prompts", "has pictures that are your photos again"


class Candidate(NamedTuple):
    """What the choice knows of one model.

    Attributes:
        name: in samples.json.
        distance: from the baseline; 1 is the result.
        likeness, before: to the photos, of each image that chooses [N], and of the baseline's with the same seeds.
        kept: (prompts of other things that are kept, of how many, of the baseline's); None: not measured.
        num_copies: of photos; None: not looked for.
    """

    name: str
    distance: float
    likeness: np.ndarray
    before: np.ndarray
    kept: tuple[int, int, int] | None
    num_copies: int | None

    def gain(self, num_looks: int) -> bool | None:
        """Whether likeness has risen, one of so many that are looked at together; None of too few images."""
        return intervals.has_risen((self.likeness - self.before)[None], num_looks)

    @property
    def keeps_others(self) -> bool:
        return self.kept is None or self.kept[0] >= self.kept[2]


class Choice(NamedTuple):
    """The answer: what to take if it is TAKE, and what cannot be told from it."""

    answer: str
    sentence: str
    why: str
    chosen: str | None = None
    equal: tuple[str, ...] = ()


def choose(candidates: list[Candidate], scorer: Scorer) -> Choice:
    """The choice by the rule above."""
    if not scorer.knows or scorer.no_way:
        return Choice(LOOK, LOOK_AT, scorer.line or f"A choice {scorer.no_way}.")
    gains = [each.gain(len(candidates)) for each in candidates]
    gaining = [each for each, gain in zip(candidates, gains, strict=True) if gain]
    if not gaining and None in gains:
        return Choice(LOOK, LOOK_AT, "A choice needs more pictures: --num_images.")
    if not gaining:
        return Choice(NONE, "None yet: train on.", "No pictures were found nearer to your photos than the base's.")
    if any(each.num_copies is None for each in gaining):
        return Choice(LOOK, LOOK_AT, "Copies of your photos were not looked for.")
    sound = [each for each in gaining if not each.num_copies]
    fit = [each for each in sound if each.keeps_others]
    if not fit:
        why = (
            "Train for fewer steps, or with prior preservation."
            if sound
            else "Train for fewer steps, or on more photos."
        )
        lacking = LOSES if sound else COPIES
        return Choice(NONE, f"None of these: each that comes nearer to your photos {lacking}.", why)
    return _nearest_to_baseline(fit)


def _nearest_to_baseline(fit: list[Candidate]) -> Choice:
    best = intervals.not_worse_than_best(np.stack([each.likeness for each in fit]))
    equal = [each for each, is_best in zip(fit, best, strict=True) if is_best]
    taken, *others = sorted(equal, key=lambda each: each.distance)
    why = "None of its pictures is one of your photos again; other prompts were not measured."
    if taken.kept is not None:
        why = "None of its pictures is one of your photos again, and {} of {} other prompts are kept.".format(
            *taken.kept
        )
    if others:
        why += f" These pictures do not tell it from {listed([label(each.name) for each in others])}."
    return Choice(TAKE, f"Take {label(taken.name)}.", why, taken.name, tuple(each.name for each in others))


def describe(table: ImageTable, scorer: Scorer, baseline: Path, finetuned: Path) -> dict:
    """metrics.json's "choice": the answer, and what is known of every candidate, the nearest to the baseline first.

    Args:
        baseline, finetuned: the pipelines' folders.
    """
    models = table.samples["candidates"]["models"]
    last_step = (run_of(finetuned).get("result") or {}).get("num_steps")
    names = sorted((name for name in models if name != BASELINE), key=lambda name: distance(name, last_step))
    names = list(
        {models[name]["sha256"]["unet"]: name for name in names}.values()
    )  # the last checkpoint is the result
    copies = {name: table.copies(name, of_candidates=True) for name in names}
    candidates = []
    for name in names:
        found, num_compared = copies[name]
        candidates.append(_candidate(table, scorer, name, last_step, len(found) if num_compared else None))
    choice = choose(candidates, scorer)
    said = choice._asdict() | dict(command=choice.chosen and export_command(finetuned, baseline, choice.chosen))
    if choice.chosen and (way := _told_way(table, scorer, choice.chosen)):
        said["sentence"] += f" {way_in_words(way, LIKENESS[scorer.encoder][1])}"
    said["entries"] = [
        _entry(table, scorer, each, copies[each.name][0], len(candidates))
        | dict(command=export_command(finetuned, baseline, each.name))
        for each in candidates
    ]
    return said


def _rows(table: ImageTable, model: str) -> tuple[np.ndarray, np.ndarray]:
    """([N], [K]): the images of the subject that choose, and those that tell how far the chosen one has come."""
    rows = table.rows(model, SUBJECT, of_candidates=True)[0]
    num_choosing = max(len(rows) - NUM_TELLING, len(rows) // 2)
    return rows[:num_choosing], rows[num_choosing:]


def _told_way(table: ImageTable, scorer: Scorer, name: str) -> intervals.Way | None:
    ours, theirs = (_rows(table, model)[1][None] for model in (name, BASELINE))
    return way_of(table, scorer, ours, theirs)


def _candidate(
    table: ImageTable, scorer: Scorer, name: str, last_step: int | None, num_copies: int | None
) -> Candidate:
    values = table.values.get(LIKENESS[scorer.encoder][0]) if scorer.encoder else None
    (kept, num), (before, _) = (count_kept(table.others(model, of_candidates=True)) for model in (name, BASELINE))
    ours, theirs = (
        values[_rows(table, model)[0]] if values is not None else np.zeros(0) for model in (name, BASELINE)
    )
    return Candidate(name, distance(name, last_step), ours, theirs, (kept, num, before) if num else None, num_copies)


def _entry(table: ImageTable, scorer: Scorer, candidate: Candidate, copies: list[dict], num_looks: int) -> dict:
    """What the page shows of a candidate; nothing by a scorer that does not know such photos."""
    files = [entry["file"] for entry in table.samples["candidates"]["images"] if entry["model"] == candidate.name]
    note, kept = (COPIES if copies else ""), None
    if scorer.knows and not scorer.no_way:
        gain = candidate.gain(num_looks)
        note = note or ("" if gain else "not found nearer to your photos")
        note = note or ("" if candidate.keeps_others else LOSES)
        kept = candidate.kept and dict(zip(("kept", "of", "of_base"), candidate.kept, strict=True))
    said = dict(name=candidate.name, label=label(candidate.name), note=note)
    return said | dict(others=kept, copies=copies, images=files)
