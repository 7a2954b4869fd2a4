"""Each check is found beyond its threshold and not before, says what it could not look for, and shows its numbers."""

import json
from dataclasses import asdict

import pytest

from tests.helpers.measured import entry, measured, without
from utils.evaluation import checks, verdict, visible
from utils.evaluation.findings import FOUND, GOOD, MISSED, NOT_FOUND, NOT_LOOKED_FOR, SPOILT, UNCERTAIN, UNKNOWN

KINDS = ["subject", "prompt", "blank", "memorisation", "collapse", "drift", "spread", "class", "photos"]


def judge(record: dict) -> verdict.Verdict:
    return verdict.judge(record, "finetuned")


def check(record: dict, kind: str):
    (found,) = [each for each in judge(record).checks if each.kind == kind]
    return found


def states(record: dict, state: str) -> list[str]:
    return [each.kind for each in judge(record).checks if each.state == state]


def test_a_good_run_has_nothing_found_but_the_subject():
    judged = judge(measured())
    assert [each.kind for each in judged.checks] == KINDS
    assert states(measured(), FOUND) == ["subject"]
    assert states(measured(), NOT_FOUND) == KINDS[1:]
    assert (judged.state, judged.gaps) == (GOOD, "")
    assert judged.headline == "It draws your cat, and nothing that was looked for has suffered."
    json.dumps(asdict(judged), allow_nan=False)


@pytest.mark.parametrize(
    ("numbers", "kind", "shown"),
    [
        (dict(copied=5, copy_max=0.98), "memorisation", ["5 of 20", "0.980", "0.950"]),
        (dict(div_clip=0.014), "collapse", ["0.014", "0.100", "0.450"]),
        (dict(clip_t_other=0.55), "drift", ["0.550", "0.669", "−0.119", "−0.139 to −0.099"]),
        (dict(clip_i_other=0.30), "spread", ["0.300", "0.050", "+0.250", "+0.230 to +0.270"]),
        (dict(blank=["output-2.png"]), "blank", ["output-2.png", "1 image is"]),
        (dict(clip_t=0.42), "prompt", ["0.420", "0.640", "−0.220", "0.600"]),
        (dict(pres_clip=0.7), "class", ["0.700", "0.120", "+0.580"]),
        (dict(real=0.97), "photos", ["0.970"]),
    ],
)
def test_what_is_found_shows_the_numbers_behind_it(numbers, kind, shown):
    record = measured(**numbers)
    assert states(record, FOUND) == ["subject", kind]
    found = check(record, kind)
    assert all(text in found.text for text in shown), found.text
    assert found.advice
    assert judge(record).state == (SPOILT if found.level == "warning" else GOOD)


@pytest.mark.parametrize(
    "numbers",
    [
        dict(copied=1, copy_max=0.99),  # less than one image in ten
        dict(div_clip=0.105),  # less than a quarter of the baseline's, and more than the photos'
        dict(clip_t_other=0.65),  # less than people see
        dict(pres_clip=0.4),  # less than half of what the subject gained
    ],
)
def test_below_the_threshold_nothing_is_found(numbers):
    assert set(states(measured(**numbers), FOUND)) <= {"subject"}


@pytest.mark.parametrize(
    ("kind", "metric", "value"),
    [("subject", "clip_i", 0.74), ("prompt", "clip_t", 0.42), ("drift", "clip_t_other", 0.463)]
    + [("spread", "clip_i_other", 0.4), ("class", "pres_clip", 0.7)],
)
def test_a_change_within_its_uncertainty_is_neither_found_nor_ruled_out(kind, metric, value):
    record = measured(**{metric: value}, margin=0.9)
    found = check(record, kind)
    assert found.state == UNCERTAIN and "95% interval" in found.text and found.advice
    record["changes"]["finetuned"][metric]["interval"] = None
    found = check(record, kind)
    assert found.state == UNCERTAIN and "no interval" in found.text
    assert f"Too few images to tell: {checks.QUESTIONS['subject']}" in judge(measured(margin=0.9)).gaps


@pytest.mark.parametrize(
    ("kind", "metric", "state"), [("subject", "clip_i", UNKNOWN), ("drift", "clip_t_other", GOOD)]
)
def test_what_was_not_measured_is_said_with_the_reason(kind, metric, state):
    record = without(measured(), metric, "needs something")
    assert states(record, NOT_LOOKED_FOR) == [kind] and "needs something" in check(record, kind).text
    assert judge(record).gaps == f"Not looked for: {checks.QUESTIONS[kind]}." and judge(record).state == state


def test_one_thing_that_has_drifted_is_found_among_others_that_have_not():
    """As measured on the embedded model: after 100 steps every dog is the cat, and seven other things are not."""
    record = measured(clip_t_other=0.604, margin=0.09)
    assert check(record, "drift").state == UNCERTAIN
    dog = dict(prompt="a photo of a dog", value=-0.37, interval=[-0.6, -0.13])
    house = dict(prompt="a photo of a house", value=-0.03, interval=[-0.11, 0.05])
    record["changes"]["finetuned"]["clip_t_other"]["prompts"] = [house, dog]
    found = check(record, "drift")
    assert found.state == FOUND and "Most of all: “a photo of a dog” (−0.370" in found.text
    assert "house" not in found.text and judge(record).state == SPOILT


@pytest.mark.parametrize(
    ("ours", "before", "state"),
    [
        (["a.png"], [], FOUND),
        ([], [], NOT_FOUND),
        (["a.png"], ["a.png"], NOT_FOUND),
        (["a.png"] * 3, ["a.png"], FOUND),
    ],
)
def test_pictures_of_other_things_that_look_like_the_subject_are_counted(ours, before, state):
    record = measured(clip_i_other=0.2, margin=0.5)
    for model, files in (("finetuned", ours), ("baseline", before)):
        record["models"][model]["clip_i_other"].update(like_subject=files, num_images=8)
    found = check(record, "spread")
    assert found.state == state and f"{len(ours)} of 8 pictures" in found.text
    assert found.files == tuple(ours) and ("in none of 8 other pictures" in found.title) == (not ours)
    assert ("more than 31% of such pictures" in found.text) == (not ours)


def test_a_subject_half_way_is_not_drawn_yet():
    record = measured(clip_i=0.3)
    judged = judge(record)
    assert judged.state == MISSED
    assert judged.headline == "It looks more like your cat, but not like it yet."
    record["photos"]["real_clip"] = dict(value=None, reason="needs two different photos or more")
    assert judge(record).state == GOOD  # one photo: how alike two are is not known
    assert "less like your subject" in check(measured(clip_i=-0.5), "subject").title


def test_a_prompt_is_followed_well_enough_if_the_photos_follow_it_no_better():
    record = measured(clip_t=0.42)
    record["photos"]["clip_t"] = entry(0.46)
    found = check(record, "prompt")
    assert (found.state, found.advice) == (NOT_FOUND, "")
    assert found.title == "It follows the prompt as well as your photos do"
    assert "0.420" in found.text and "0.460" in found.text
    record["photos"]["clip_t"] = entry(0.48)
    assert check(record, "prompt").state == FOUND


def test_dino_speaks_for_the_subject_if_there_is_dino():
    record = measured()
    assert visible.fidelity_metric(record) == "clip_i"
    record["encoders"]["dino"] = {}
    assert visible.fidelity_metric(record) == "dino"
    for name, other in (("dino", "clip_i"), ("dino_other", "clip_i_other")):
        for part in (*record["models"].values(), record["changes"]["finetuned"]):
            part[name] = part[other]
    assert check(record, "spread").comparisons[0].visible == 0.1
