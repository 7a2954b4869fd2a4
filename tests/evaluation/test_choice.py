"""The choice among several models: the largest gain of the good ones, and a plain word if there is none."""

from tests.helpers.measured import measured, with_checkpoint
from utils.evaluation.choice import choose


def test_there_is_no_choice_of_one():
    assert choose(measured()) is None


def test_the_largest_gain_of_those_without_a_warning():
    overfitted, good = measured(clip_i=0.95, copied=5, div_clip=0.01), measured()
    choice = choose(with_checkpoint(overfitted, good))
    assert (choice.model, choice.is_good, choice.sentence) == ("checkpoint-5", True, "Take checkpoint-5.")
    assert "+0.681" in choice.why and "1 of 2" in choice.why
    choice = choose(with_checkpoint(good, measured(clip_i=0.6)))
    assert choice.model == "finetuned" and "among" not in choice.why
    assert choice.sentence == "Take the fine-tuned model."


def test_none_is_good_and_it_says_so():
    copied, collapsed = measured(copied=5), measured(clip_i=0.95, div_clip=0.01)
    choice = choose(with_checkpoint(copied, collapsed))
    assert choice.model == "checkpoint-5" and not choice.is_good
    assert choice.sentence == "None of the 2 is good: checkpoint-5 is the least bad."
    drifted = measured(clip_t_other=0.5)
    choice = choose(with_checkpoint(copied, drifted))
    assert choice.model == "checkpoint-5" and not choice.is_good and "neither copy photos" in choice.why


def test_one_that_has_not_learned_the_subject_is_not_good():
    choice = choose(with_checkpoint(measured(clip_i=0.04), measured(clip_i=0.05)))
    assert not choice.is_good and choice.sentence.startswith("None of the 2 is good")
