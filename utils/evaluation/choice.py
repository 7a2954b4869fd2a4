"""--choose: which of the candidates to take, by pictures that are drawn quickly for this alone.

A candidate is taken if its pictures are found nearer to the photos than the baseline's, by a scorer that knows such
photos, none of them is a photo again, and other prompts are kept, if they could be measured. Of those that cannot be
told from the best (Hsu) it is the one nearest to the baseline. Pictures that it was not chosen by have to tell how far
it has come.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.evaluation import intervals
from utils.evaluation.candidates import FOLDER, NUM_TELLING, distance, export_command, label
from utils.evaluation.image_table import ImageTable
from utils.evaluation.metrics import LIKENESS
from utils.evaluation.prompts import SUBJECT
from utils.evaluation.samples import BASELINE
from utils.evaluation.scorer import FEW_PICTURES, Scorer
from utils.evaluation.sentences import count_kept, way_in_words, way_of
from utils.evaluation.wording import listed
from utils.files.ownership import run_of

TAKE, NONE, LOOK = "take", "none", "look"  # the answers
LEAST_IMAGES = 3  # that choose: of two, hardly any gain is found
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
        way: how far it has come, of images that do not choose; None if they cannot tell.
    """

    name: str
    distance: float
    likeness: np.ndarray
    before: np.ndarray
    kept: tuple[int, int, int] | None
    num_copies: int | None
    way: intervals.Way | None

    def gains(self, num_looks: int) -> bool:
        """Whether it has come nearer to the photos, being one of so many that are looked at together."""
        return bool(intervals.has_risen((self.likeness - self.before)[None], num_looks))

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
        return Choice(LOOK, LOOK_AT, f"A choice {scorer.no_way}." if scorer.no_way else "")  # its line is said already
    gaining = [each for each in candidates if each.gains(len(candidates))]
    if any(each.likeness.size < LEAST_IMAGES for each in candidates):
        return Choice(LOOK, LOOK_AT, f"A choice {FEW_PICTURES}.")
    if not gaining:
        return Choice(NONE, "None yet: train on.", "No pictures were found nearer to your photos than the base's.")
    if any(each.num_copies is None for each in gaining):
        return Choice(LOOK, LOOK_AT, "Copies of your photos were not looked for.")
    sound = [each for each in gaining if not each.num_copies]
    fit = [each for each in sound if each.keeps_others]
    if not fit:
        lacking, advice = (LOSES, "with prior preservation") if sound else (COPIES, "on more photos")
        sentence = f"None of these: each that comes nearer to your photos {lacking}."
        return Choice(NONE, sentence, f"Train for fewer steps, or {advice}.")
    return _nearest_to_baseline(fit)


def _nearest_to_baseline(fit: list[Candidate]) -> Choice:
    best = intervals.not_worse_than_best(np.stack([each.likeness for each in fit]))
    equal = [each for each, is_best in zip(fit, best, strict=True) if is_best]
    taken, *others = sorted(equal, key=lambda each: each.distance)
    if taken.way is None:
        return Choice(
            LOOK, LOOK_AT, f"{label(taken.name).capitalize()} comes nearer, but other pictures do not tell how far."
        )
    kept = "{} of {} other prompts are kept".format(*taken.kept) if taken.kept else "other prompts were not measured"
    why = f"None of its pictures is one of your photos again; {kept}."
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
    by_weights = {models[name]["sha256"]["unet"]: name for name in names}  # the last checkpoint may be the result
    candidates = [_candidate(table, scorer, name, last_step) for name in by_weights.values()]
    choice = choose(candidates, scorer)
    commands = {each.name: export_command(finetuned, baseline, each.name) for each in candidates}
    way = next((each.way for each in candidates if each.name == choice.chosen), None)
    sentence = choice.sentence + (f" {way_in_words(way, LIKENESS[scorer.encoder][1])}" if way else "")
    entries = [
        dict(
            name=each.name,
            label=label(each.name),
            command=commands[each.name],
            note=_note(each, scorer, len(candidates)),
            copies=table.copies[f"{FOLDER}/{each.name}"][0],
        )
        for each in candidates
    ]
    return choice._asdict() | dict(sentence=sentence, command=commands.get(choice.chosen or ""), entries=entries)


def _rows(table: ImageTable, model: str) -> tuple[np.ndarray, np.ndarray]:
    """([N], [K]): the images of the subject that choose, and those that tell how far the chosen one has come."""
    rows = table.rows(f"{FOLDER}/{model}", SUBJECT)[0]
    num_choosing = max(len(rows) - NUM_TELLING, len(rows) // 2)
    return rows[:num_choosing], rows[num_choosing:]


def _candidate(table: ImageTable, scorer: Scorer, name: str, last_step: int | None) -> Candidate:
    values = table.values.get(LIKENESS[scorer.encoder][0] if scorer.encoder else "", np.zeros(len(table.entries)))
    (kept, num), (before, _) = (count_kept(table.others[f"{FOLDER}/{model}"]) for model in (name, BASELINE))
    found, num_compared = table.copies[f"{FOLDER}/{name}"]
    (ours, told), (theirs, told_before) = (_rows(table, model) for model in (name, BASELINE))
    way = way_of(table, scorer, told[None], told_before[None]) if scorer.knows and not scorer.no_way else None
    counted, num_copies = (kept, num, before) if num else None, len(found) if num_compared else None
    place = distance(name, last_step)
    return Candidate(name, place, values[ours], values[theirs], counted, num_copies, way)


def _note(candidate: Candidate, scorer: Scorer, num_looks: int) -> str:
    """Why a candidate is out; nothing by a scorer that does not know such photos."""
    if candidate.num_copies:
        return COPIES
    if not scorer.knows or scorer.no_way:
        return ""
    if not candidate.gains(num_looks):
        return "not found nearer to your photos"
    kept = candidate.kept
    return f"{LOSES}: {kept[0]} of {kept[1]} kept" if kept and not candidate.keeps_others else ""
