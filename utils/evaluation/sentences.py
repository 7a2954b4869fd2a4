"""What is said of a model: at most three sentences, each a measurement with its interval (bench/sentences.py).

And what was not measured, with what would measure it.
"""

import numpy as np

from utils.evaluation import intervals
from utils.evaluation.image_table import ImageTable
from utils.evaluation.metrics import LIKENESS, real_similarity
from utils.evaluation.prompts import SUBJECT
from utils.evaluation.samples import BASELINE
from utils.evaluation.scorer import FEW_PICTURES, NO_PHOTOS, Scorer
from utils.evaluation.wording import listed, percent

NO_OTHERS = "needs two pictures of other things or more: --class_name, --drift_prompt, and --num_drift_images above 0"
LEAST_TEXTS = 2


def say(table: ImageTable, scorer: Scorer, model: str) -> dict:
    """What is said of a model beside the baseline: sentences of the kinds scorer, way, others and copies, and whole
    sentences on what is missing."""
    said: dict[str, list] = dict(sentences=[], unmeasured=[])

    def add(kind: str, text: str, otherwise: str = "", reason: str = "") -> None:
        if text:
            said["sentences"].append(dict(kind=kind, text=text))
        else:
            said["unmeasured"].append(f"{otherwise}: this {reason}.")

    if scorer.knows:
        way, reason = _way(table, scorer, model)
        add("way", way, "How far it has come was not measured", reason)
        things, places = ([count_kept(by[name]) for name in (model, BASELINE)] for by in (table.others, table.places))
        text = others(things, places) if things[0][1] >= LEAST_TEXTS and not scorer.no_others else ""
        add("others", text, "Other prompts were not measured", scorer.no_others or NO_OTHERS)
    else:
        add("scorer", scorer.line)
    found, num_compared = table.copies[model]
    text = copies(len(found), num_compared) if num_compared else ""
    add("copies", text, "Copies of your photos were not looked for", NO_PHOTOS)
    return said


def _way(table: ImageTable, scorer: Scorer, model: str) -> tuple[str, str]:
    """(the sentence, why there is none)."""
    ours, theirs = table.rows(model, SUBJECT), table.rows(BASELINE, SUBJECT)
    if scorer.no_way:
        return "", scorer.no_way
    if way := way_of(table, scorer, ours, theirs):
        return way_in_words(way, LIKENESS[scorer.encoder][1]), ""
    values = table.values[LIKENESS[scorer.encoder][0]]
    nearer = int((values[ours] > values[theirs]).sum())
    return "", f"{FEW_PICTURES}; of these, {nearer} of {ours.size} have come nearer to your photos"


def way_of(table: ImageTable, scorer: Scorer, ours: np.ndarray, theirs: np.ndarray) -> intervals.Way | None:
    """How far the images of the rows `ours` [P,K] have come from those of `theirs` to the photos."""
    values, photos = table.values[LIKENESS[scorer.encoder][0]], table.photos[scorer.encoder]
    return intervals.share_of_way(values[ours], values[theirs], real_similarity(photos))


def way_in_words(way: intervals.Way, by: str) -> str:
    """'62% of the way from the base's pictures to your photos (95%: 51 to 73%), by DINO.'"""
    whose = "" if way.unit == "prompts" else "; for other seeds of these prompts"
    ends = f"{percent(way.low)} to {percent(way.high)}"
    return f"{percent(way.value)} of the way from the base's pictures to your photos (95%: {ends}{whose}), by {by}."


def count_kept(pictures: list[dict]) -> tuple[int, int]:
    """(prompts of other things to which most of their own pictures are the nearest, prompts)."""
    by_prompt: dict[str, list[bool]] = {}
    for picture in pictures:
        by_prompt.setdefault(picture["prompt"], []).append(picture["kept"])
    return sum(2 * sum(kept) > len(kept) for kept in by_prompt.values()), len(by_prompt)


def others(things: list[tuple[int, int]], places: list[tuple[int, int]]) -> str:
    """'7 of 8 pictures of other things (95%: 47% to 100%) fit their own prompt best; of the base's 8 of 8.'

    Args:
        things, places: what count_kept found of the model and of the base; with no place, nothing is said of places.
    """
    said = {"pictures of other things": things, "of your subject in other places": places}
    said = {what: counted for what, counted in said.items() if counted[0][1]}
    ours = [f"{kept} of {number} {what} ({_ends(kept, number)})" for what, ((kept, number), _) in said.items()]
    theirs = [f"{kept} of {number}" for _, (kept, number) in said.values()]
    return f"{listed(ours)} fit their own prompt best; of the base's {listed(theirs)}."


def copies(found: int, looked_at: int) -> str:
    """'None of 8 pictures of your subject is one of your photos again (95%: 0% to 37%).'"""
    count, verb = found or "None", "is" if found < 2 else "are"
    text = f"{count} of {looked_at} pictures of your subject {verb} one of your photos again"
    return f"{text} ({_ends(found, looked_at)})."


def _ends(count: int, number: int) -> str:
    low, high = intervals.share(count, number)
    return f"95%: {percent(low)} to {percent(high)}"
