"""The learning rates of a run."""

import pytest

from utils.training.learning_rates import learning_rate_table


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_learning_rates_warm_up_and_follow_diffusers(name):
    table = learning_rate_table(1e-3, name, num_warmup_steps=4, num_training_steps=20, num_cycles=2, power=1.0)
    assert (
        len(table) == 20 and table[0] == 0 and table[2] == pytest.approx(0.5e-3) and max(table) == pytest.approx(1e-3)
    )
    assert table[-1] < 1e-3 or name == "constant_with_warmup"
