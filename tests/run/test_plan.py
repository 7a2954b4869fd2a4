"""The defaults and the learning rates of a run."""

import pytest
import torch
from diffusers import optimization

from tests.helpers.script import make_args
from utils.arguments import LR_SCHEDULERS
from utils.run.plan import make_plan
from utils.training.build import learning_rate_table

COUNTS = dict(num_parameters=1, num_photos=1, num_ranks=5, on_gpu=True, save_dtype="fp32")


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rates_follow_diffusers_schedules(tmp_path, name):
    """From the flags to the table: what diffusers' own schedule of that name gives AdamW, update by update."""
    args = make_args(tmp_path, lr_scheduler=name, learning_rate=1e-3, max_train_steps=20)
    args.lr_warmup_steps, args.lr_num_cycles, args.lr_power = 0 if name == "constant" else 4, 2, 2.0
    assert len(learning_rate_table(1e-3, name, num_training_steps=5, num_warmup_steps=5)) == 5  # up to its end
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    warm_up, options = args.lr_warmup_steps, dict(num_training_steps=20, num_cycles=2, power=2.0)
    schedule, rates = optimization.get_scheduler(name, optimizer, num_warmup_steps=warm_up, **options), []
    for _ in range(20):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert learning_rate_table(**make_plan(args, **COUNTS).learning_rates) == rates
    assert len(set(rates)) > 3 or name == "constant"


@pytest.mark.parametrize(
    ("spread", "expected"),
    [
        (dict(train_batch_size=1, num_train_epochs=2), 8),
        (dict(train_batch_size=3, num_train_epochs=1), 2),
        (dict(train_batch_size=3, num_train_epochs=3), 4),
        (dict(train_batch_size=16, num_train_epochs=100), 25),
        (dict(train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=3), 3),
        (dict(train_batch_size=4, num_train_epochs=5, max_train_steps=1), 1),
    ],
)
def test_epochs_become_steps(tmp_path, spread, expected):
    assert make_plan(make_args(tmp_path, **spread), **COUNTS | dict(num_photos=4, num_ranks=1)).num_steps == expected


def test_fp16_takes_the_place_of_bf16_where_there_is_none(tmp_path):
    both = make_args(tmp_path, mixed_precision="bf16", prior_generation_precision="bf16")
    for args, has_bf16, expected in (
        (both, True, ("bf16", "bf16")),
        (both, False, ("fp16", "fp16")),
        (make_args(tmp_path, mixed_precision="no"), False, ("no", None)),
    ):
        found = make_plan(args, has_bf16=has_bf16, **COUNTS).arguments
        assert (found["mixed_precision"], found["prior_generation_precision"]) == expected


def test_each_value_goes_where_it_belongs(tmp_path):
    """Those that a wrong place would not be seen of, because it changes the result as well."""
    flags = dict(adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-3, adam_weight_decay=0.5, max_grad_norm=2.0)
    args = make_args(tmp_path, **flags, train_batch_size=2, gradient_accumulation_steps=3, max_train_steps=4)
    plan = make_plan(args, **COUNTS | dict(on_gpu=False))
    adamw = dict(betas=(0.8, 0.99), eps=1e-3, weight_decay=0.5, max_grad_norm=2.0, use_8bit_adam=False)
    assert plan.optimizer == adamw | dict(gradient_checkpointing=False, offload_optimizer="none")
    sampling = dict(seed=0, num_ranks=5, batch_size=2, num_micro_batches=3, noise_offset=0.0)
    assert plan.sampling == sampling and plan.samples_per_step == 30
    assert (plan.needs.train_batch_size, plan.needs.num_ranks, plan.needs.fp32) == (2, 5, True)


@pytest.mark.parametrize("changed", [{}, dict(offload_optimizer="all"), dict(with_prior_preservation=True)])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_weights_go_ahead_to_a_gpu_that_has_room_for_them(tmp_path, changed, on_gpu):
    args = make_args(tmp_path)
    vars(args).update(changed)
    assert make_plan(args, **COUNTS | dict(on_gpu=on_gpu)).reads_ahead is (on_gpu and not changed)
