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
    return sum(a * b for a, b in zip(first, second, strict=True))


def array(rows) -> np.ndarray:
    return np.array(rows, np.float64)


GENERATED, PHOTOS, TEXTS = vectors(12, 0), vectors(5, 1), vectors(12, 2)


def test_unit_rows():
    rows = metrics.unit_rows(np.float32([[3, 4], [0, -2]]))
    assert rows.dtype == np.float64 and rows.tolist() == [[0.6, 0.8], [0, -1]]


def test_clip_i_dino_and_pres_are_the_mean_over_all_pairs():
    expected = sum(dot(image, photo) for image in GENERATED for photo in PHOTOS) / (len(GENERATED) * len(PHOTOS))
    assert metrics.photo_similarity(array(GENERATED), array(PHOTOS)).mean() == pytest.approx(expected, abs=TOLERANCE)


def test_clip_t_pairs_each_image_with_its_own_prompt_unscaled():
    expected = sum(dot(image, text) for image, text in zip(GENERATED, TEXTS, strict=True)) / len(GENERATED)
    assert metrics.text_similarity(array(GENERATED), array(TEXTS)).mean() == pytest.approx(expected, abs=TOLERANCE)
    opposite = metrics.text_similarity(array(GENERATED), -array(GENERATED))
    assert np.allclose(opposite, -1)  # no clamp at zero, no factor 2.5 or 100


def test_copy_takes_each_images_nearest_photo():
    nearest = [max(dot(image, photo) for photo in PHOTOS) for image in GENERATED]
    found = metrics.nearest_photo_similarity(array(GENERATED), array(PHOTOS))
    assert found == pytest.approx(nearest, abs=TOLERANCE)


def test_real_leaves_self_pairs_out():
    pairs = [dot(a, b) for i, a in enumerate(PHOTOS) for j, b in enumerate(PHOTOS) if i != j]
    assert len(pairs) == 20
    assert metrics.real_similarity(array(PHOTOS)) == pytest.approx(sum(pairs) / 20, abs=TOLERANCE)
    assert metrics.real_similarity(array(PHOTOS[:1])) is None


def test_nearest_among_the_photos():
    values = [max(dot(a, b) for j, b in enumerate(PHOTOS) if j != i) for i, a in enumerate(PHOTOS)]
    expected = sum(values) / len(values)
    assert metrics.real_nearest_similarity(array(PHOTOS)) == pytest.approx(expected, abs=TOLERANCE)
    assert metrics.real_nearest_similarity(array(PHOTOS[:1])) is None


def test_div_is_the_mean_over_prompts_of_pairs_within_the_prompt():
    by_prompt = [GENERATED[0:4], GENERATED[4:8], GENERATED[8:12]]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    means = [sum(1 - dot(images[i], images[j]) for i, j in pairs) / len(pairs) for images in by_prompt]
    found = metrics.diversity(metrics.pair_distances(array(by_prompt)))
    assert found == pytest.approx(sum(means) / 3, abs=TOLERANCE)
    assert metrics.diversity(metrics.pair_distances(array(GENERATED)[:, None])) is None


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_printed_table(degrees, expected):
    assert metrics.t_quantile(degrees) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("degrees", "expected"), [(1, 31.821), (2, 6.965), (3, 4.541), (4, 3.747), (10, 2.764)])
def test_quantiles_of_another_share(degrees, expected):
    assert metrics.t_quantile(degrees, 0.99) == pytest.approx(expected, abs=6e-4)
    assert metrics.t_quantile(1.5, 0.99) == pytest.approx((31.821 + 6.965) / 2, abs=6e-4)


def test_one_prompt_has_students_interval_over_its_seeds():
    low, high = metrics.mean_interval(array([[1, 2, 3, 4]]))
    half = 3.182 * math.sqrt(5 / 3 / 4)  # variance 5/3 of 4 values
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-3)


def test_two_prompts_have_students_interval_over_their_means():
    low, high = metrics.mean_interval(array([[1, 2, 3], [5, 6, 7]]))
    assert (low, high) == pytest.approx((4 - 12.706 * 2, 4 + 12.706 * 2), rel=5e-4)  # means 2 and 6


@pytest.mark.parametrize(
    ("layout", "seeds_part"),
    [((1, 2), 0), ((1, 4), 0), ((2, 2), 0), ((5, 4), 0), ((25, 4), 0), ((5, 4), 1), ((25, 4), 1)],
)
def test_an_interval_holds_the_mean_as_often_as_it_says(layout, seeds_part):
    draws = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        of_prompt = draws.normal(size=(layout[0], 1)) * (layout[0] > 1)
        of_seed = draws.normal(size=(1, layout[1])) * seeds_part
        low, high = metrics.mean_interval(of_prompt + of_seed + draws.normal(size=layout))
        held += low <= 0 <= high
    assert 0.935 <= held / 2000 <= 0.975  # 0.93 to 0.97, and the simulation's own error


def test_several_looks_widen_each_interval():
    low, high = metrics.student_interval(array([1, 2, 3, 4]), 5)
    half = 5.841 * math.sqrt(5 / 3 / 4)  # the quantile of 0.995
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-3)


def test_the_seeds_interval_takes_the_prompts_as_they_are():
    values = array([[1, 2, 3, 4], [101, 102, 103, 104]])
    low, high = metrics.seeds_interval(values)
    assert (low + high) / 2 == 52.5
    assert high - low == pytest.approx(np.ptp(metrics.student_interval(values[0])))
    assert metrics.seeds_interval(values[:, :1]) is None


def test_what_an_image_adds_to_div_is_div_less_what_is_left_without_it():
    rows = [GENERATED[0:4], GENERATED[4:8]]
    distances = metrics.pair_distances(array(rows))
    found = metrics.pseudo_values(distances)
    for p, images in enumerate(rows):
        whole = metrics.diversity(metrics.pair_distances(array([images])))
        for k in range(4):
            rest = metrics.diversity(metrics.pair_distances(array([images[:k] + images[k + 1 :]])))
            assert found[p, k] == pytest.approx(4 * whole - 3 * rest, abs=TOLERANCE)
    assert found.mean() == pytest.approx(metrics.diversity(distances), abs=TOLERANCE)


def test_an_interval_of_div_makes_no_pair_of_an_image_with_itself():
    distances = np.full((2, 3, 3), 0.4)
    distances[:, range(3), range(3)] = 0.0
    assert metrics.diversity_interval(distances) == pytest.approx([0.4, 0.4])


def test_an_interval_of_real_is_around_real():
    low, high = metrics.real_interval(array(PHOTOS))
    assert (low + high) / 2 == pytest.approx(metrics.real_similarity(array(PHOTOS)), abs=TOLERANCE)
    assert metrics.real_interval(array(PHOTOS[:2])) is None


def test_too_few_images_have_no_interval():
    assert metrics.mean_interval(np.ones((1, 1))) is None
    assert metrics.mean_interval(np.ones((5, 1))) is None  # nothing tells what the seed adds
    assert metrics.mean_interval(np.ones((25, 2))) is None and metrics.mean_interval(np.ones((4, 2))) is not None
    assert metrics.student_interval(np.ones(1)) is None
    assert metrics.diversity_interval(np.zeros((1, 2, 2))) is None


def test_an_image_is_measured_by_its_photos_nearest_other_photo():
    def direction(degrees):
        return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]

    photos = np.array([direction(degrees) for degrees in (0, 10, 60)])  # the third one is far from the others
    images = np.array([direction(degrees) for degrees in (2, 21, 25, 70, 120)])
    assert metrics.nearer_than_photos(images, photos).tolist() == [True, False, False, True, False]
    assert metrics.nearest_other_similarity(photos) == pytest.approx(np.cos(np.radians([10, 10, 50])))
    assert metrics.nearest_other_similarity(photos[:1]) is None


def test_a_photo_that_is_there_twice_counts_once():
    photos, copied = array(vectors(4, 5)), array(vectors(4, 5))[:1]
    twice = np.concatenate([photos, metrics.unit_rows(copied + 1e-3)])
    assert metrics.nearer_than_photos(copied, photos).tolist() == [True]
    assert metrics.nearer_than_photos(copied, twice).tolist() == [True]
    assert metrics.real_nearest_similarity(twice) == metrics.real_nearest_similarity(photos)
    assert metrics.nearer_than_photos(copied, np.repeat(copied, 3, axis=0)) is None
    assert metrics.real_nearest_similarity(np.repeat(copied, 3, axis=0)) is None
