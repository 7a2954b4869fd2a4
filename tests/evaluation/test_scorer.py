"""A scorer is believed if it tells the photos from the base's pictures, and their class from other words."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils.evaluation import scorer
from utils.evaluation.metrics import unit_rows
from utils.evaluation.prompts import class_prompt, dozen_words


def rows(count: int, towards: np.ndarray, spread: float, seed: int) -> np.ndarray:
    return unit_rows(towards + spread * np.random.default_rng(seed).normal(size=(count, 32)))


SUBJECT, OTHERS = np.eye(32)[0], np.eye(32)[1]
PHOTOS, DRAWN = rows(5, SUBJECT, 0.1, 0), rows(12, OTHERS, 0.1, 1)


def test_photos_are_told_from_pictures_that_are_less_like_them():
    assert scorer.are_told_apart(PHOTOS, DRAWN) is True
    assert scorer.are_told_apart(PHOTOS, rows(12, SUBJECT, 0.1, 2)) is False
    assert scorer.are_told_apart(PHOTOS, rows(12, SUBJECT, 0.02, 2)) is False  # nearer than they are to one another
    assert scorer.are_told_apart(PHOTOS[:1], DRAWN) is None and scorer.are_told_apart(PHOTOS[:2], DRAWN[:1]) is None


def test_chance_tells_no_photos_apart():
    random = [
        scorer.are_told_apart(rows(3, 0 * SUBJECT, 1, seed), rows(5, 0 * SUBJECT, 1, -seed - 1 + 10_000))
        for seed in range(400)
    ]
    assert np.mean(random) <= 0.05


@pytest.mark.parametrize(("first", "expected"), [(5, True), (4, True), (3, False), (0, False)])
def test_the_class_is_the_first_of_a_dozen_words_for_three_photos_of_four(first, expected):
    words = np.eye(32)[:12]
    assert scorer.is_class_first(np.concatenate([PHOTOS[:first], DRAWN[: 5 - first]]), words) is expected


def table(*, photos=PHOTOS, drawn=DRAWN, class_vector=SUBJECT, class_name="cat", reads=True):
    words = dict(zip(map(class_prompt, dozen_words("cat")), [class_vector, *np.eye(32)[2:]], strict=False))
    return SimpleNamespace(
        images=dict(clip=drawn),
        photos=dict(clip=photos) if photos is not None else {},
        names=dict(clip="CLIP (some)"),
        samples=dict(class_name=class_name),
        text=words.__getitem__ if reads else None,
        rows=lambda model, role: np.arange(len(drawn) // 3 * 3).reshape(3, -1)[:1],
    )


def test_what_may_be_said():
    assert scorer.test(table()) == scorer.Scorer("clip", "", "", "")
    assert scorer.test(table(reads=False)) == scorer.Scorer("clip", "", "", scorer.NO_TEXT)
    line = "This scorer, CLIP (some), does not know such photos: look at the pictures."
    for unknown in (
        table(class_vector=np.eye(32)[20]),
        table(drawn=PHOTOS[[0, 1, 2, 3, 4] * 3]),
        table(drawn=rows(12, SUBJECT, 0.05, 3), reads=False),
    ):
        assert (scorer.test(unknown).line, scorer.test(unknown).knows) == (line, False)


def test_what_cannot_be_tested_is_not_said():
    assert scorer.test(table(photos=None)).no_way == scorer.NO_PHOTOS
    alone = scorer.test(table(photos=PHOTOS[:1]))
    assert (alone.knows, alone.no_way, alone.no_others) == (True, scorer.TWO_PHOTOS, "")
    unnamed = scorer.test(table(class_name=None))
    assert unnamed.no_way == unnamed.no_others == scorer.NO_CLASS
