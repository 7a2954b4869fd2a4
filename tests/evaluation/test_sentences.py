"""What is said of a model: at most three sentences with their intervals, and what was not measured."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from utils.evaluation import sentences
from utils.evaluation.intervals import Way, describe_change
from utils.evaluation.metrics import PAPER
from utils.evaluation.scorer import NO_TEXT, TWO_PHOTOS, Scorer
from utils.evaluation.sentences import count_kept, say

KNOWS = Scorer("clip", "", "", "")
PROMPTS = [f"a photo of a {thing}" for thing in ("dog", "house", "car", "tree", "flower", "boat", "chair", "apple")]


def others(*lost: int) -> list[dict]:
    """Of eight other prompts with one picture each."""
    return [dict(prompt=prompt, kept=place not in lost) for place, prompt in enumerate(PROMPTS)]


def table(
    ours: float, theirs: float, photos: float, *, num_prompts: int = 5, num_images: int = 4, spread: float = 0.02
):
    """Images of both models and photos with these mean likenesses."""
    draws = np.random.default_rng(0)
    values = np.concatenate([mean + spread * draws.normal(size=num_prompts * num_images) for mean in (ours, theirs)])
    turned = np.sqrt(1 - photos) * np.eye(5) + (np.sqrt(1 + 4 * photos) - np.sqrt(1 - photos)) / 5  # cosines: photos
    indices = np.arange(len(values)).reshape(2, num_prompts, num_images)
    return SimpleNamespace(
        values=dict(clip_i=values),
        photos=dict(clip=turned / np.linalg.norm(turned, axis=1, keepdims=True)),
        rows=lambda model, *roles: indices[0 if model == "finetuned" else 1],
    )


def said_of(table, scorer=KNOWS, *, lost=(), ignored=(), copies=0, compared=8, reads=True):
    none: dict[str, list] = dict(finetuned=[], baseline=[])
    table.others = dict(finetuned=others(*lost), baseline=others()) if reads else none
    table.places = dict(finetuned=others(*ignored)[:4], baseline=others()[:4]) if reads else none
    table.copies = dict(finetuned=([dict(file=str(number)) for number in range(copies)], compared))
    said = say(table, scorer, "finetuned")
    sentences = [(sentence["kind"], sentence["text"]) for sentence in said["sentences"]]
    return SimpleNamespace(sentences=sentences, unmeasured=said["unmeasured"])


def test_three_sentences_each_with_its_interval():
    said = said_of(table(0.56, 0.2, 0.8), lost=[3], copies=2)
    assert [kind for kind, _ in said.sentences] == ["way", "others", "copies"] and said.unmeasured == []
    way, kept, copies = (text for _, text in said.sentences)
    share, low, high = map(int, re.findall(r"(\d+)%(?!:)", way.replace("95%:", "")))
    assert low < share < high and share == pytest.approx(60, abs=3)
    assert "of the way from the base's pictures to your photos" in way and way.endswith("by CLIP-I.")
    assert kept == (
        "7 of 8 pictures of other things (95%: 47% to 100%) and 4 of 4 of your subject in other places (95%: 40% to "
        "100%) fit their own prompt best; of the base's 8 of 8 and 4 of 4."
    )
    assert copies.startswith("2 of 8 pictures of your subject are one of your photos again (95%: ")


def test_places_that_were_all_ignored_are_said_and_none_are_not():
    said = dict(said_of(table(0.56, 0.2, 0.8), ignored=range(4)).sentences)["others"]
    assert " and 0 of 4 of your subject in other places (95%: 0% to 60%) fit their own prompt best" in said
    nowhere = sentences.others([(7, 8), (8, 8)], [(0, 0), (0, 0)])
    assert nowhere == (
        "7 of 8 pictures of other things (95%: 47% to 100%) fit their own prompt best; of the base's 8 of 8."
    )


def test_zero_is_the_base_and_100_are_the_photos():
    none, whole = (said_of(table(ours, 0.2, 0.8, num_prompts=25)).sentences[0][1] for ours in (0.2, 0.8))
    assert re.match("(0|\u22121|1)%", none) and re.match("(99|100|101)%", whole)
    few = said_of(table(0.2, 0.2, 0.8))  # of 20 images that have not all come nearer no interval holds
    assert "way" not in dict(few.sentences) and re.search(r"\d+ of 20 have come nearer", few.unmeasured[0])


def test_an_interval_of_few_prompts_says_so():
    assert "of these prompts" in sentences.way_in_words(Way(0.5, 0.4, 0.6, "images"), "DINO")
    assert sentences.way_in_words(Way(0.5, -0.04, 0.6, "prompts"), "DINO") == (
        "50% of the way from the base's pictures to your photos (95%: \u22124% to 60%), by DINO."
    )


def test_a_scorer_that_does_not_know_the_photos_says_that_alone():
    said = said_of(table(0.56, 0.2, 0.8), Scorer("clip", "This scorer, X, does not know such photos.", "", ""))
    assert [kind for kind, _ in said.sentences] == ["scorer", "copies"]  # copies need no scorer
    assert said.sentences[0][1] == "This scorer, X, does not know such photos."


def test_what_was_not_measured_is_said_with_what_would_measure_it():
    said = said_of(table(0.56, 0.2, 0.8), Scorer("clip", "", TWO_PHOTOS, NO_TEXT), compared=0)
    assert said.sentences == [] and len(said.unmeasured) == 3
    assert TWO_PHOTOS in said.unmeasured[0] and "--clip_model" in said.unmeasured[1]
    assert "--instance_data_dir" in said.unmeasured[2]
    none = said_of(table(0.56, 0.2, 0.8), reads=False)
    assert "--drift_prompt" in none.unmeasured[0] and "others" not in dict(none.sentences)


def test_nothing_good_or_bad_is_said():
    """No line above which it draws your cat, no memorised photos, no price."""
    for ours in (0.2, 0.3, 0.5, 0.79):
        texts = " ".join(text for _, text in said_of(table(ours, 0.2, 0.8), lost=[0, 1], copies=3).sentences)
        assert not re.search("draws|Good|price|memoris|found|visibl", texts)


def test_every_copy_counts():
    assert (
        sentences.copies(9, 100) == "9 of 100 pictures of your subject are one of your photos again (95%: 4% to 16%)."
    )
    assert sentences.copies(0, 4).startswith(
        "None of 4 pictures of your subject is one of your photos again (95%: 0% to"
    )


def test_a_prompt_is_kept_if_most_of_its_pictures_are():
    pictures = [dict(prompt=p, kept=kept) for p, kept in (("a", True), ("a", False), ("b", True), ("b", True))]
    assert count_kept(pictures) == (1, 2) and count_kept([]) == (0, 0)


# The paper's table 1, with a plausible likeness of the base's pictures, and what docs/evaluation.md says of it.
BASE = dict(dino=(0.35, 0.08), clip_i=(0.70, 0.04), clip_t=(0.31, 0.03))  # and how far images differ
FAR = {
    "real images": (100, 100),
    "DreamBooth, Stable Diffusion": (75, 56),
    "Textual Inversion, Stable Diffusion": (52, 43),
}


@pytest.mark.parametrize(("layout", "within"), [((25, 4), 5), ((5, 4), 9), ((1, 4), 20)])
@pytest.mark.parametrize("name", PAPER)
def test_of_the_papers_values_something_sensible_is_said(name, layout, within):
    for column, expected in zip(("dino", "clip_i"), FAR[name], strict=True):
        base, spread = BASE[column]
        photos = PAPER["real images"][column]
        size = dict(num_prompts=layout[0], num_images=layout[1], spread=spread)
        text = said_of(table(PAPER[name][column], base, photos, **size)).sentences[0][1]
        share, low, high = map(int, re.findall(r"(\d+)%(?!:)", text.replace("95%:", "")))
        assert 0 < low <= share <= high and abs(share - expected) <= within
        assert ("of these prompts" in text) == (layout[0] <= 4)


@pytest.mark.parametrize("layout", [(25, 4), (5, 4), (1, 4)])
def test_of_the_papers_clip_t_it_is_said_that_textual_inversion_loses_the_prompt(layout):
    base, spread = BASE["clip_t"]
    draws = spread * np.sqrt(2) * np.random.default_rng(0).normal(size=layout)
    told = [describe_change(PAPER[name]["clip_t"] - base + draws)["text"] for name in list(FAR)[1:]]
    if layout == (25, 4):
        assert told[0].startswith("changed by less than 0.0") and told[1].startswith("fell by 0.05")
    else:
        assert all(text.startswith("cannot be told from so few; up in ") for text in told)
