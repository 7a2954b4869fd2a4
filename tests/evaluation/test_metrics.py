"""The paper's metrics against plain loops, on vectors of which the answer is known."""

import numpy as np
import pytest

from utils.evaluation.metrics import diversity, photo_similarity, real_similarity, text_similarity, unit_rows


@pytest.fixture
def rows() -> np.ndarray:
    return unit_rows(np.random.default_rng(0).normal(size=(6, 8)) + 0.5)


def test_every_image_meets_every_photo_and_its_own_text(rows):
    images, others = rows[:4], rows[2:]
    expected = [np.mean([image @ other for other in others]) for image in images]
    assert photo_similarity(images, others) == pytest.approx(expected)
    assert text_similarity(images, others) == pytest.approx([a @ b for a, b in zip(images, others, strict=True)])
    assert text_similarity(images, -images) == pytest.approx([-1] * 4)  # not clamped at zero


def test_photos_are_not_compared_with_themselves(rows):
    expected = [np.mean([rows[i] @ rows[j] for j in range(6) if j != i]) for i in range(6)]
    assert real_similarity(rows) == pytest.approx(expected)


def test_diversity_is_of_pairs_of_a_prompts_images(rows):
    images = rows.reshape(2, 3, 8)
    expected = [1 - np.mean([row[0] @ row[1], row[0] @ row[2], row[1] @ row[2]]) for row in images]
    assert diversity(images) == pytest.approx(expected)
    assert diversity(images[:, :1]) is None
