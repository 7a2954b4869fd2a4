"""The defaults and the learning rates of a run."""

from functools import partial

import pytest
import torch
from diffusers import optimization

from tests.helpers.script import make_args
from utils.arguments import LR_SCHEDULERS
from utils.run.plan import fill_in_defaults, make_plan
from utils.training.learning_rates import learning_rate_table

SCHEDULES = {
    "constant": optimization.get_constant_schedule,
    "constant_with_warmup": partial(optimization.get_constant_schedule_with_warmup, num_warmup_steps=4),
    "linear": partial(optimization.get_linear_schedule_with_warmup, num_warmup_steps=4, num_training_steps=20),
    "cosine": partial(optimization.get_cosine_schedule_with_warmup, num_warmup_steps=4, num_training_steps=20),
    "cosine_with_restarts": partial(
        optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
        num_warmup_steps=4,
        num_training_steps=20,
        num_cycles=2,
    ),
    "polynomial": partial(
        optimization.get_polynomial_decay_schedule_with_warmup, num_warmup_steps=4, num_training_steps=20, power=2.0
    ),
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rates_follow_diffusers_schedules(tmp_path, name):
    """From the flags to the table: what diffusers' own schedule of that name gives AdamW, update by update."""
    args = make_args(tmp_path, lr_scheduler=name, learning_rate=1e-3, max_train_steps=20)
    args.lr_warmup_steps, args.lr_num_cycles, args.lr_power = 0 if name == "constant" else 4, 2, 2.0
    filled = fill_in_defaults(args, num_photos=1, num_ranks=1, on_gpu=False, save_dtype="fp32")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule, rates = SCHEDULES[name](optimizer), []
    for _ in range(20):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert learning_rate_table(**make_plan(filled, num_parameters=1, num_ranks=1).learning_rates) == rates
    assert len(set(rates)) > 3 or name == "constant"


def test_fp16_takes_the_place_of_bf16_where_there_is_none(tmp_path):
    args = make_args(tmp_path, mixed_precision="bf16", prior_generation_precision="bf16", max_train_steps=1)
    counts = dict(num_photos=1, num_ranks=1, on_gpu=True, save_dtype="fp32")
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        filled = fill_in_defaults(args, has_bf16=has_bf16, **counts)
        assert (filled.mixed_precision, filled.prior_generation_precision) == (expected, expected)
    plain = fill_in_defaults(make_args(tmp_path, mixed_precision="no"), has_bf16=False, **counts)
    assert (plain.mixed_precision, plain.prior_generation_precision) == ("no", None)


def test_each_value_goes_where_it_belongs(tmp_path):
    """Those that a wrong place would not be seen of, because it changes the result as well."""
    flags = dict(adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-3, adam_weight_decay=0.5, max_grad_norm=2.0)
    args = make_args(tmp_path, **flags, train_batch_size=2, gradient_accumulation_steps=3, max_train_steps=4)
    filled = fill_in_defaults(args, num_photos=1, num_ranks=5, on_gpu=False, save_dtype="fp32")
    plan = make_plan(filled, num_parameters=1, num_ranks=5)
    assert plan.adamw == dict(betas=(0.8, 0.99), eps=1e-3, weight_decay=0.5, max_grad_norm=2.0, use_8bit_adam=False)
    sampling = dict(seed=0, num_ranks=5, batch_size=2, num_micro_batches=3, noise_offset=0.0)
    assert plan.sampling == sampling and plan.samples_per_step == 30
    assert (plan.needs.train_batch_size, plan.needs.num_ranks, plan.needs.fp32) == (2, 5, True)
