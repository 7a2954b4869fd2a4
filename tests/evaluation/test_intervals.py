"""Exact values from tables, and how often intervals hold, by the bench that makes the table of every sentence."""

import math

import numpy as np
import pytest

from bench import sentences as bench
from utils.evaluation import intervals

TRIALS = 600
FROM, TO = 0.93 - 0.025, 0.97 + 0.02  # less and more than it by three standard errors of the simulation


def held(trial) -> float | None:
    """The share of intervals that hold; None where none is shown."""
    said, wrong = bench.rate(trial, TRIALS)
    return 1 - wrong / said if said else None


@pytest.mark.parametrize(
    ("count", "number", "low", "high"),
    [(0, 8, 0, 0.3694), (7, 8, 0.4735, 0.9968), (8, 8, 0.6306, 1), (9, 100, 0.0420, 0.1640), (0, 1, 0, 0.975)],
)
def test_the_interval_of_a_count_is_exact(count, number, low, high):
    assert intervals.share(count, number) == pytest.approx((low, high), abs=1e-4)


def test_each_end_of_a_counts_interval_leaves_a_fortieth():
    low, high = intervals.share(5, 19)
    at_least = sum(math.comb(19, k) * low**k * (1 - low) ** (19 - k) for k in range(5, 20))
    at_most = sum(math.comb(19, k) * high**k * (1 - high) ** (19 - k) for k in range(6))
    assert (at_least, at_most) == pytest.approx((0.025, 0.025), abs=1e-9)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (3, 3.1824), (7, 2.3646), (24, 2.0639), (99, 1.9842)])
def test_students_quantiles_are_those_of_the_tables(degrees, quantile):
    assert intervals.t_quantile(degrees) == pytest.approx(quantile, abs=1e-4)


@pytest.mark.parametrize("shape", ["normal", "skewed", "bounded", "rare"])
@pytest.mark.parametrize("layout", bench.LAYOUTS)
def test_a_mean_change_has_an_interval_only_where_it_holds(layout, shape):
    def trial(draws):
        found = intervals.mean_change(bench.changes(draws, shape, *layout) + 0.3)
        return None if found is None else not found.low <= 0.3 <= found.high

    share = held(trial)
    assert share is None if layout != (25, 4) else FROM <= share <= TO


@pytest.mark.parametrize("shape", ["normal", "skewed", "bounded"])
def test_thirty_subjects_have_one(shape):
    assert FROM <= held(bench.of_subjects(shape, 0.0)) <= TO


@pytest.mark.parametrize("shape", ["normal", "a little skewed", "skewed the other way", "even"])
@pytest.mark.parametrize(("layout", "unit"), [((1, 4), "images"), ((5, 4), "prompts"), ((25, 4), "prompts")])
def test_how_far_holds(layout, unit, shape):
    assert FROM <= held(bench.of_way(shape, layout, 0.7, 0.05)) <= TO
    likeness = np.linspace(0.1, 0.2, layout[0] * layout[1]).reshape(layout)
    way = intervals.share_of_way(likeness + 0.4, likeness, np.array([0.7, 0.9]))
    assert way.unit == unit and way.low < way.value < way.high and way.value == pytest.approx(0.4 / 0.65)


def test_how_far_holds_if_few_pictures_show_the_subject():
    assert bench.rate(bench.of_way("rare", (25, 4), 0.5, 0.05), 4000)[1] <= 0.05


def test_how_far_is_not_said_of_few_that_have_not_all_come_nearer():
    base, photos = np.array([[0.2, 0.21, 0.19, 0.2]]), np.array([0.8])
    assert intervals.share_of_way(base + np.array([[0.5, 0.5, 0.5, -0.01]]), base, photos) is None
    assert intervals.share_of_way(base + np.array([[0.001, 0.5, 0.001, 0.001]]), base, photos) is None
    seven_of_eight = np.array([[0.5, 0.51, 0.5, 0.49, 0.5, 0.52, 0.5, -0.01]])
    assert intervals.share_of_way(np.tile(base, 2) + seven_of_eight, np.tile(base, 2), photos) is None
    assert intervals.share_of_way(np.tile(base, 2) + abs(seven_of_eight) + 0.1, np.tile(base, 2), photos) is not None
    assert intervals.share_of_way(base[:, :1] + 0.3, base[:, :1], photos) is None
    assert bench.rate(bench.of_way("rare", (1, 4), 1, 0.05), TRIALS)[1] <= 0.05


def test_how_far_needs_a_base_that_is_told_from_the_photos():
    base = np.array([[0.1, 0.9, 0.2, 0.95]])
    assert intervals.share_of_way(base + np.array([[0.3, 0.31, 0.32, 0.33]]), base, np.array([0.6])) is None


def test_a_change_is_said_in_one_of_three_forms():
    draws = np.random.default_rng(0).normal(size=(25, 4))
    rose, fell, small = (intervals.describe_change(draws + by) for by in (2, -2, 0))
    assert rose["text"].startswith("rose by ") and rose["interval"][0] > 0 and rose["unit"] == "prompts"
    assert fell["text"].startswith("fell by ") and "(95%: " in fell["text"] and fell["interval"][1] < 0
    assert small["text"] == f"changed by less than {np.abs(small['interval']).max():.3f}"
    few = intervals.describe_change(np.array([[0.1, 0.2, -0.1, 0.3]]))
    assert few["interval"] is None and few["text"] == "cannot be told from so few; up in 3 of 4 images"


@pytest.mark.parametrize("shape", ["normal", "skewed", "rare"])
@pytest.mark.parametrize("layout", [(1, 4), (8, 1), (5, 4)])
def test_of_several_that_gained_nothing_none_has_risen(layout, shape):
    assert bench.rate(bench.of_gain(shape, layout, 6), TRIALS)[1] <= 0.05 + 0.02
    assert intervals.has_risen(
        np.full(layout, 0.5) + 0.01 * np.arange(layout[1]) + 0.001 * np.arange(layout[0])[:, None]
    )


def test_one_picture_does_not_tell_whether_it_has_risen():
    assert intervals.has_risen(np.ones((1, 1))) is None


@pytest.mark.parametrize(("number", "images"), [(2, 4), (6, 4), (4, 12)])
def test_the_best_is_among_those_that_may_be(number, images):
    for shape in ("normal", "a little skewed"):
        assert bench.rate(bench.of_best(shape, number, images, 0.0), TRIALS)[1] <= 0.05 + 0.03


def test_what_is_clearly_worse_is_not_among_them():
    images = np.random.default_rng(0).normal(size=8)
    values = images + np.array([0.0, 4.99, 5.0])[:, None] + 0.1 * np.random.default_rng(1).normal(size=(3, 8))
    assert intervals.not_worse_than_best(values).tolist() == [False, True, True]
    assert intervals.not_worse_than_best(values[:1]).tolist() == [True]
    assert intervals.not_worse_than_best(values[:, :1]).all()


def test_the_bench_prints_every_sentence_with_how_often_it_is_wrong():
    printed = [row.sentence for row in bench.rows(3)]
    assert "Take X. (of those that learnt nothing)" in printed
    assert {"rose by", "changed by less", "p% of the way (95%: a to b)"} <= set(printed)
    assert {"Take X: its likeness has risen", "Take X: not told from the best"} <= set(printed)
