"""Each warning fires beyond its threshold and not before, with its numbers; the best checkpoint."""

import copy

import pytest

from utils.evaluation import verdict


def entry(value, interval=None, **more):
    return dict(value=value, interval=interval, **more)


def measured(
    *, clip_i=0.74, clip_t=0.42, copied=0, copy_max=0.81, div=0.11, pres=0.3, other=0.645, real=0.9, nearest=0.95
) -> dict:
    """metrics.json in short: a baseline, and a fine-tuned model that gives no reason to warn."""
    baseline = dict(clip_i=entry(0.03), clip_t=entry(0.64), copy_clip=entry(0.08), copy_clip_max=entry(0.2))
    baseline |= dict(div_clip=entry(0.45), pres_clip=entry(0.12), clip_t_other=entry(0.669))
    ours = dict(clip_i=entry(clip_i), clip_t=entry(clip_t))
    ours["copy_clip"] = entry(0.76, num_above_photos=copied, num_images=20)
    ours |= dict(copy_clip_max=entry(copy_max), div_clip=entry(div), pres_clip=entry(pres), clip_t_other=entry(other))
    changes = {
        name: entry(ours[name]["value"] - baseline[name]["value"], [-0.9, 0.9] if name == "clip_t" else [0.5, 0.9])
        for name in ("clip_i", "clip_t", "pres_clip", "clip_t_other")
    }
    photos = dict(real_clip=entry(real), nearest_clip=entry(nearest), clip_t_class=entry(0.3))
    record = dict(encoders=dict(clip={}, dino=None), photos=photos, models=dict(baseline=baseline, finetuned=ours))
    record["changes"] = dict(finetuned=changes)
    record["warnings"] = dict(finetuned=verdict.find_warnings(record, "finetuned"))
    return record


def kinds(record: dict, level: str = "warning") -> list[str]:
    return [warning["kind"] for warning in record["warnings"]["finetuned"] if warning["level"] == level]


def test_a_good_run_has_no_warning():
    assert measured()["warnings"]["finetuned"] == []


@pytest.mark.parametrize(
    ("numbers", "kind", "shown"),
    [
        (dict(copied=5, copy_max=0.98), "memorisation", ["5 of 20", "0.980", "0.950"]),
        (dict(div=0.014), "collapse", ["0.014", "0.100", "0.450"]),
        (dict(other=0.55), "drift", ["0.550", "0.669", "−0.119"]),
    ],
)
def test_a_warning_shows_the_numbers_behind_it(numbers, kind, shown):
    record = measured(**numbers)
    assert kinds(record) == [kind]
    (warning,) = record["warnings"]["finetuned"]
    assert all(text in warning["text"] for text in shown), warning["text"]


@pytest.mark.parametrize(
    "numbers",
    [
        dict(copied=1, copy_max=0.99),  # less than one image in ten
        dict(div=0.105),  # less than a quarter of the baseline's, and more than the photos'
        dict(div=0.2, real=0.7),  # less than the photos', and not far below the baseline's
        dict(other=0.62),  # less than people see
    ],
)
def test_below_the_threshold_there_is_none(numbers):
    assert kinds(measured(**numbers)) == []


def test_notes_are_no_warnings():
    record = measured(pres=0.7, real=0.97, nearest=0.98)
    assert kinds(record) == [] and kinds(record, "note") == ["class", "photos"]


def test_what_was_not_measured_is_not_warned_of():
    record = measured()
    for values in record["models"].values():
        for value in values.values():
            value.update(value=None, reason="needs a model")
            value.pop("num_above_photos", None)
    for value in record["photos"].values():
        value["value"] = None
    record["changes"] = dict(finetuned={})
    assert verdict.find_warnings(record, "finetuned") == []
    assert verdict.headline(record, "finetuned") == []
    record["encoders"]["clip"] = None
    assert verdict.find_warnings(record, "finetuned") == []


def test_the_headline_says_how_much():
    subject, prompt, photos = verdict.headline(measured(), "finetuned")
    assert subject == (
        "It looks more like your subject: CLIP-I went from 0.030 to 0.740 (+0.710, 95% interval +0.500 to +0.900)."
    )
    assert prompt.startswith("It follows the prompt visibly less: CLIP-T went from 0.640 to 0.420 (−0.220")
    assert "0.300" in photos
    record = measured()
    record["changes"]["finetuned"]["clip_i"]["interval"] = [-0.1, 0.2]
    record["changes"]["finetuned"]["clip_t"]["value"] = -0.01
    subject, prompt = verdict.headline(record, "finetuned")
    assert subject.startswith("It looks no more like your subject") and "about as well" in prompt


def with_checkpoint(record: dict, other: dict) -> dict:
    both = copy.deepcopy(record)
    for part in ("models", "changes", "warnings"):
        both[part]["checkpoint-5"] = other[part]["finetuned"]
    return both


def test_the_best_checkpoint_has_the_largest_gain_of_those_that_did_not_memorise():
    assert verdict.best_model(measured()) is None
    overfitted, good = measured(clip_i=0.95, copied=5, div=0.01), measured()
    name, why = verdict.best_model(with_checkpoint(overfitted, good))
    assert name == "checkpoint-5" and "+0.466" in why and "1 of 2" in why
    name, why = verdict.best_model(with_checkpoint(good, measured(clip_i=0.5)))
    assert name == "finetuned" and "among" not in why


def test_dino_speaks_for_the_subject_where_there_is_dino():
    record = measured()
    assert verdict.fidelity_metric(record) == "clip_i"
    record["encoders"]["dino"] = {}
    assert verdict.fidelity_metric(record) == "dino"
