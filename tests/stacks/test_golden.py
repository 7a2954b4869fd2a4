"""Twenty steps on the embedded model do what they did when tests/stacks/golden_trajectory.json was made."""

import copy
import json

import numpy as np
import pytest

from tests.stacks import golden
from train_dreambooth_colossalai import main


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads(golden.GOLDEN_FILE.read_text())


def test_the_trajectory_is_the_golden_one(tmp_path, expected):
    assert main(golden.golden_argv(tmp_path / "output")) == 0
    assert golden.complaints(golden.differences(golden.trajectory(tmp_path / "output"), expected)) == []


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda found: found["loss"].__setitem__(3, found["loss"][3] * 1.0001), "loss"),
        (lambda found: found["loss"].__setitem__(3, float("nan")), "loss"),
        (lambda found: found["grad_norm"].__setitem__(19, found["grad_norm"][19] * 0.999), "grad_norm"),
        (lambda found: found["blocks"]["mid_block"]["projections"].reverse(), "change"),
    ],
)
def test_a_difference_is_named(expected, damage, named):
    found = copy.deepcopy(expected)
    assert golden.complaints(golden.differences(found, expected)) == []
    damage(found)
    (line,) = golden.complaints(golden.differences(found, expected))
    assert line.startswith(f"{named} differs by ")


def test_projections_tell_how_far_apart_two_changes_are():
    rng = np.random.default_rng(0)
    change = {f"mid_block.weight{number}": rng.standard_normal((64, 9)) for number in range(4)}
    other = {name: value + 0.1 * rng.standard_normal(value.shape) for name, value in change.items()}
    found, expected = golden.block_changes(other), golden.block_changes(change)
    apart = golden.differences(
        dict(loss=[1], grad_norm=[1], blocks=found), dict(loss=[1], grad_norm=[1], blocks=expected)
    )
    assert expected["mid_block"]["norm"] == pytest.approx(48, rel=0.05)
    assert 0.05 < apart["change"] < 0.2
