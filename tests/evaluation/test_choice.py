"""The rule of the choice: what is taken, what is named beside it, and when nothing is."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from utils.evaluation.choice import Candidate, choose, describe
from utils.evaluation.intervals import Way
from utils.evaluation.scorer import TWO_PHOTOS, Scorer

KNOWS, WAY = Scorer("clip", "", "", ""), Way(0.5, 0.3, 0.7, "images")


def candidate(name, distance, gain, *, kept=(8, 8, 8), copies=0, num=6, spread=0.03, seed=None):
    """With its images' likeness so much above the baseline's."""
    draws = np.random.default_rng(seed if seed is not None else round(1000 * distance))
    before = 0.2 + spread * np.random.default_rng(0).normal(size=num)
    return Candidate(name, distance, before + gain + spread * draws.normal(size=num), before, kept, copies, WAY)


def test_of_those_that_cannot_be_told_from_the_best_the_nearest_to_the_baseline():
    weak, half, most, whole = (
        candidate(f"checkpoint-{n}", n / 4, g) for n, g in ((1, 0.2), (2, 0.5), (3, 0.5), (4, 0.5))
    )
    choice = choose([whole, weak, most, half], KNOWS)
    assert (choice.answer, choice.chosen, set(choice.equal)) == (
        "take",
        "checkpoint-2",
        {"checkpoint-3", "checkpoint-4"},
    )
    assert choice.sentence == "Take step 2." and "step 3 and step 4" in choice.why and "8 of 8" in choice.why
    clear = choose([weak, candidate("checkpoint-2", 0.5, 0.5), candidate("finetuned", 1, 0.7)], KNOWS)
    assert (clear.chosen, clear.equal, clear.sentence) == ("finetuned", (), "Take the result.")


def test_what_learnt_nothing_is_not_taken():
    choice = choose([candidate("finetuned@0.5", 0.5, 0.0), candidate("finetuned", 1, 0.0)], KNOWS)
    assert (choice.answer, choice.chosen, choice.sentence) == ("none", None, "None yet: train on.")
    one = [
        choose([candidate("finetuned", n, 0.0, seed=n + 9 * seed) for n in range(1, 7)], KNOWS) for seed in range(300)
    ]
    assert np.mean([each.answer == "take" for each in one]) <= 0.06  # six at a time


def test_pictures_that_did_not_choose_have_to_tell_how_far():
    assert choose([candidate("finetuned", 1, 0.5)._replace(way=None)], KNOWS).answer == "look"


def test_copies_and_lost_prompts_are_not_taken():
    copying, losing = candidate("finetuned", 1, 0.8, copies=1), candidate("checkpoint-3", 0.7, 0.7, kept=(7, 8, 8))
    sound = candidate("checkpoint-1", 0.2, 0.3)
    assert choose([copying, losing, sound], KNOWS).chosen == "checkpoint-1"
    assert "other prompts" in choose([copying, losing], KNOWS).sentence
    none = choose([copying], KNOWS)
    assert (none.answer, none.chosen) == ("none", None) and "your photos again" in none.sentence


@pytest.mark.parametrize(
    "scorer", [Scorer("clip", "This scorer does not know such photos.", "", ""), Scorer("clip", "", TWO_PHOTOS, "")]
)
def test_without_a_scorer_that_knows_the_photos_one_has_to_look(scorer):
    choice = choose([candidate("finetuned", 1, 0.8)], scorer)
    assert (choice.answer, choice.chosen) == ("look", None) and "look at them" in choice.sentence
    assert choice.why == ("" if scorer.line else f"A choice {TWO_PHOTOS}.")  # the line is said already


def test_where_nobody_looked_for_copies_one_has_to_look():
    assert choose([candidate("finetuned", 1, 0.8, copies=None)], KNOWS).answer == "look"
    assert choose([candidate("finetuned", 1, 0.8, num=1)], KNOWS).answer == "look"  # one image has no interval


def test_other_prompts_that_were_not_measured_are_said_to_be():
    choice = choose([candidate("finetuned", 1, 0.8, kept=None)], KNOWS)
    assert choice.answer == "take" and "other prompts were not measured" in choice.why and "kept" not in choice.why


def test_the_chosen_ones_number_is_of_pictures_that_it_was_not_chosen_by():
    models = dict(baseline="0", finetuned="1", **{"finetuned@0.5": "2", "checkpoint-9": "1"})  # the last is the result
    entries = [dict(model=name, file=f"{name}-{seed}") for name in models for seed in range(10)]
    likeness = dict(zip(models, ([0.2] * 10, [0.5] * 6 + [0.3] * 4, [0.2] * 10, [0.5] * 6 + [0.3] * 4), strict=True))
    places = {name: np.arange(10)[None] + 10 * place for place, name in enumerate(models)}
    table = SimpleNamespace(
        samples=dict(
            candidates=dict(models={n: dict(sha256=dict(unet=u)) for n, u in models.items()}, images=entries)
        ),
        entries=entries,
        values=dict(clip_i=np.concatenate([*likeness.values()]) + 0.004 * np.random.default_rng(0).normal(size=40)),
        photos=dict(clip=np.tile(np.eye(3)[0], (3, 1))),  # as alike as can be: 1
        rows=lambda model, *roles: places[model.removeprefix("candidates/")],
        others={f"candidates/{name}": [dict(prompt="a boat", kept=True)] for name in models},
        copies={f"candidates/{name}": ([], 10) for name in models},
    )
    found = describe(table, KNOWS, Path("base"), Path("missing"))
    assert [entry["name"] for entry in found["entries"]] == ["finetuned@0.5", "finetuned"]
    assert (found["chosen"], found["command"]) == ("finetuned", None)
    assert found["sentence"].startswith(("Take the result. 12%", "Take the result. 13%"))  # 0.1 of 0.8, not 0.3
    assert [entry["note"] for entry in found["entries"]] == ["not found nearer to your photos", ""]
    table.others["candidates/finetuned"] = [dict(prompt="a boat", kept=False)]
    assert (
        describe(table, KNOWS, Path("base"), Path("missing"))["entries"][1]["note"]
        == "loses other prompts: 0 of 1 kept"
    )
