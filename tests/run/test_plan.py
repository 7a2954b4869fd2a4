"""The defaults and the learning rates of a run."""

import pytest

from tests.helpers.script import make_args
from utils.run.plan import fill_in_defaults
from utils.training.learning_rates import learning_rate_table


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_learning_rates_warm_up_and_follow_diffusers(name):
    table = learning_rate_table(1e-3, name, num_warmup_steps=4, num_training_steps=20, num_cycles=2, power=1.0)
    assert (
        len(table) == 20 and table[0] == 0 and table[2] == pytest.approx(0.5e-3) and max(table) == pytest.approx(1e-3)
    )
    assert table[-1] < 1e-3 or name == "constant_with_warmup"


def test_fp16_takes_the_place_of_bf16_where_there_is_none(tmp_path):
    args = make_args(tmp_path, mixed_precision="bf16", prior_generation_precision="bf16", max_train_steps=1)
    counts = dict(num_photos=1, num_ranks=1, on_gpu=True, save_dtype="fp32")
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        filled = fill_in_defaults(args, has_bf16=has_bf16, **counts)
        assert (filled.mixed_precision, filled.prior_generation_precision) == (expected, expected)
    plain = fill_in_defaults(make_args(tmp_path, mixed_precision="no"), has_bf16=False, **counts)
    assert (plain.mixed_precision, plain.prior_generation_precision) == ("no", None)
