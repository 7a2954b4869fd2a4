"""The rule of the choice: the nearest of the fit ones, else the best compromise, and what these images cannot tell."""

import pytest

from tests.helpers.measured import measured, without
from utils.evaluation.choice import choose


def of(record: dict, *others: dict) -> dict:
    """`record` with the others' fine-tuned models as checkpoint-1, checkpoint-2 and so on."""
    merged = record | dict(models=dict(record["models"]), changes=dict(record["changes"]))
    for step, other in enumerate(others, start=1):
        for part in ("models", "changes"):
            merged[part][f"checkpoint-{step}"] = other[part]["finetuned"]
    return merged


def test_there_is_no_choice_of_one_or_without_likeness():
    assert choose(measured()) is None
    assert choose(without(of(measured(), measured()), "clip_i", "needs your photos")) is None


def test_the_nearest_to_the_subject_of_those_that_keep_other_prompts_and_copy_nothing():
    drifted, copied = measured(clip_i=0.9, clip_t_other=0.61), measured(clip_i=0.95, copied=5)
    near, far = measured(clip_i=0.8, clip_t_other=0.63), measured(clip_i=0.7)
    choice = choose(of(drifted, copied, far, near))
    assert (choice.model, choice.is_good, choice.sentence) == ("checkpoint-3", True, "Take checkpoint-3.")
    assert "Of the 4" in choice.why and "0.800" in choice.why and "\u22120.039" in choice.why
    assert choose(of(near, far)).sentence == "Take the fine-tuned model."


def test_the_visible_difference_is_the_border():
    for lost, chosen in ((0.049, "checkpoint-1"), (0.051, "finetuned")):
        choice = choose(of(measured(clip_i=0.7), measured(clip_i=0.8, clip_t_other=0.669 - lost)))
        assert choice.model == chosen


def test_one_that_does_not_draw_the_subject_is_not_good():
    choice = choose(of(measured(clip_i=0.2), measured(clip_i=0.25)))
    assert not choice.is_good and choice.sentence.endswith("none of the 2 draws your subject well.")
    choice = choose(of(measured(clip_i=0.2), measured(clip_i=0.8)))
    assert choice.model == "checkpoint-1" and choice.is_good


@pytest.mark.parametrize(("lost_by_the_near", "chosen"), [(0.1, "finetuned"), (0.3, "checkpoint-1")])
def test_the_best_compromise_has_lost_least_of_those_that_are_nearly_as_near(lost_by_the_near, chosen):
    near, nearly = (
        measured(clip_i=0.9, clip_t_other=0.669 - lost_by_the_near),
        measured(clip_i=0.83, clip_t_other=0.46),
    )
    far, copied = measured(clip_i=0.8, clip_t_other=0.6), measured(clip_i=0.99, copied=5)
    choice = choose(of(near, nearly, far, copied))
    assert (choice.model, choice.is_good) == (chosen, False)
    assert "the best compromise: none of the 4 draws your subject and keeps other prompts" in choice.sentence


def test_if_all_copy_photos_one_of_them_is_named_and_not_called_good():
    choice = choose(of(measured(copied=5), measured(clip_i=0.8, copied=7)))
    assert choice.model == "checkpoint-1" and not choice.is_good
    assert choice.sentence.endswith("none of the 2 draws your subject without copying a photo.")


def test_without_a_text_tower_the_subject_in_other_pictures_is_the_drift():
    def record(**values):
        return without(measured(**values), "clip_t_other", "needs CLIP's text tower")

    choice = choose(of(record(clip_i=0.9, clip_i_other=0.11), record(clip_i=0.7, clip_i_other=0.09)))
    assert choice.model == "checkpoint-1" and choice.is_good
