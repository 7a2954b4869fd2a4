"""Metrics against references written as plain loops over Python floats, without numpy's matrix products."""

import math
import random

import numpy as np
import pytest

from utils.evaluation import metrics

TOLERANCE = 1e-6


def vectors(number: int, seed: int, dimensions: int = 7) -> list[list[float]]:
    draws = random.Random(seed)
    rows = []
    for _ in range(number):
        row = [draws.gauss(0.3, 1) for _ in range(dimensions)]
        length = math.sqrt(sum(value * value for value in row))
        rows.append([value / length for value in row])
    return rows


def dot(first: list[float], second: list[float]) -> float:
    total = 0.0
    for a, b in zip(first, second, strict=True):
        total += a * b
    return total


def array(rows) -> np.ndarray:
    return np.array(rows, np.float64)


GENERATED, PHOTOS, TEXTS = vectors(12, 0), vectors(5, 1), vectors(12, 2)


def test_unit_rows():
    rows = metrics.unit_rows(np.float32([[3, 4], [0, -2]]))
    assert rows.dtype == np.float64 and rows.tolist() == [[0.6, 0.8], [0, -1]]


def test_clip_i_dino_and_pres_are_the_mean_over_all_pairs():
    total = 0.0
    for image in GENERATED:
        for photo in PHOTOS:
            total += dot(image, photo)
    expected = total / (len(GENERATED) * len(PHOTOS))
    assert metrics.photo_similarity(array(GENERATED), array(PHOTOS)).mean() == pytest.approx(expected, abs=TOLERANCE)


def test_clip_t_pairs_each_image_with_its_own_prompt_unscaled():
    expected = sum(dot(image, text) for image, text in zip(GENERATED, TEXTS, strict=True)) / len(GENERATED)
    assert metrics.text_similarity(array(GENERATED), array(TEXTS)).mean() == pytest.approx(expected, abs=TOLERANCE)
    opposite = metrics.text_similarity(array(GENERATED), -array(GENERATED))
    assert np.allclose(opposite, -1)  # no clamp at zero, no factor 2.5 or 100


def test_copy_takes_each_images_nearest_photo():
    nearest = []
    for image in GENERATED:
        best = -2.0
        for photo in PHOTOS:
            best = max(best, dot(image, photo))
        nearest.append(best)
    found = metrics.nearest_photo_similarity(array(GENERATED), array(PHOTOS))
    assert found == pytest.approx(nearest, abs=TOLERANCE)


def test_real_leaves_self_pairs_out():
    total, pairs = 0.0, 0
    for i, first in enumerate(PHOTOS):
        for j, second in enumerate(PHOTOS):
            if i != j:
                total += dot(first, second)
                pairs += 1
    assert pairs == 20
    assert metrics.real_similarity(array(PHOTOS)) == pytest.approx(total / pairs, abs=TOLERANCE)
    assert metrics.real_similarity(array(PHOTOS[:1])) is None


def test_nearest_among_the_photos():
    values = [max(dot(a, b) for j, b in enumerate(PHOTOS) if j != i) for i, a in enumerate(PHOTOS)]
    expected = sum(values) / len(values)
    assert metrics.real_nearest_similarity(array(PHOTOS)) == pytest.approx(expected, abs=TOLERANCE)
    assert metrics.real_nearest_similarity(array(PHOTOS[:1])) is None


def test_div_is_the_mean_over_prompts_of_pairs_within_the_prompt():
    by_prompt = [GENERATED[0:4], GENERATED[4:8], GENERATED[8:12]]
    means = []
    for images in by_prompt:
        distances = []
        for i in range(4):
            for j in range(i + 1, 4):
                distances.append(1 - dot(images[i], images[j]))
        means.append(sum(distances) / len(distances))
    found = metrics.diversity(metrics.pair_distances(array(by_prompt)))
    assert found == pytest.approx(sum(means) / 3, abs=TOLERANCE)
    assert metrics.diversity(metrics.pair_distances(array(GENERATED)[:, None])) is None


def plain_bootstrap(values: list[list[float]], seed: int) -> list[float]:
    """The same draws, everything else in loops."""
    draws = np.random.Generator(np.random.Philox(key=seed))
    means = []
    for _ in range(metrics.NUM_RESAMPLES):
        prompts = draws.integers(len(values), size=len(values))
        seeds = draws.integers(len(values[0]), size=len(values[0]))
        drawn = [values[p][s] for p in prompts for s in seeds]
        means.append(sum(drawn) / len(drawn))
    means.sort()

    def quantile(share: float) -> float:
        place = share * (len(means) - 1)
        low = math.floor(place)
        return means[low] + (place - low) * (means[min(low + 1, len(means) - 1)] - means[low])

    return [quantile(0.025), quantile(0.975)]


def test_intervals_equal_a_plain_bootstrap():
    draws = random.Random(3)
    values = [[draws.random() for _ in range(4)] for _ in range(5)]
    expected = plain_bootstrap(values, seed=11)
    assert metrics.mean_interval(array(values), seed=11) == pytest.approx(expected, abs=TOLERANCE)
    assert metrics.mean_interval(array(values), seed=11) == metrics.mean_interval(array(values), seed=11)
    assert metrics.mean_interval(array(values), seed=11) != metrics.mean_interval(array(values), seed=12)


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    draws = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        low, high = metrics.mean_interval(draws.normal(size=(1, 30)), seed=trial)
        covered += low <= 0 <= high
    assert covered >= 50


def test_prompts_that_differ_widen_the_interval():
    alike, unlike = np.zeros((5, 4)), np.repeat(np.arange(5.0)[:, None], 4, axis=1)
    assert metrics.mean_interval(alike) == [0, 0]
    low, high = metrics.mean_interval(unlike)
    assert low < 1.5 and high > 2.5


def test_an_interval_of_div_makes_no_pair_of_an_image_with_itself():
    distances = np.full((2, 3, 3), 0.4)
    distances[:, range(3), range(3)] = 0.0
    assert metrics.diversity_interval(distances) == pytest.approx([0.4, 0.4])


def test_one_image_has_no_interval():
    assert metrics.mean_interval(np.ones((1, 1))) is None
    assert metrics.diversity_interval(np.zeros((1, 1, 1))) is None


def test_the_paired_difference_is_narrower_than_the_values():
    base = np.random.default_rng(1).normal(size=(6, 4))
    low, high = metrics.mean_interval(base + 0.1 - base)
    assert (low, high) == pytest.approx((0.1, 0.1))


def test_an_image_is_measured_by_the_fellow_of_the_photo_it_is_near_to():
    def direction(degrees):
        return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]

    photos = np.array([direction(degrees) for degrees in (0, 5, 60)])  # the third one is far from its fellow
    images = np.array([direction(degrees) for degrees in (2, 11, 20, 70, 120)])
    assert metrics.nearer_than_fellows(images, photos).tolist() == [True, False, False, True, False]
    assert metrics.fellow_similarity(photos) == pytest.approx(np.cos(np.radians([5, 5, 55])))
    assert metrics.fellow_similarity(photos[:1]) is None
