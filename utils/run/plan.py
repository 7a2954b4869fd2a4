"""What follows from the arguments, the photos and the device."""

import math
from argparse import Namespace
from typing import NamedTuple

import torch

from utils.models.loading import WEIGHT_DTYPES


def fill_in_defaults(args: Namespace, *, num_photos: int, num_ranks: int, on_gpu: bool) -> None:
    """args.mixed_precision and args.max_train_steps, where they were left out."""
    args.mixed_precision = args.mixed_precision or ("fp16" if on_gpu else "no")
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_ranks
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(num_photos / samples_per_step)


class Plan(NamedTuple):
    """What follows from the arguments, the photos and the device."""

    num_steps: int
    num_ranks: int
    samples_per_step: int
    weight_dtype: torch.dtype
    learning_rates: list[float]


def plan_run(args: Namespace, *, num_photos: int, num_ranks: int, device: torch.device) -> Plan:
    """Steps, dtype and learning rates; fills in args.mixed_precision and args.max_train_steps where left out."""
    fill_in_defaults(args, num_photos=num_photos, num_ranks=num_ranks, on_gpu=device.type == "cuda")
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_ranks
    learning_rates = learning_rate_table(
        args.learning_rate * (samples_per_step if args.scale_lr else 1),
        args.lr_scheduler,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    weight_dtype = WEIGHT_DTYPES[args.mixed_precision]
    return Plan(args.max_train_steps, num_ranks, samples_per_step, weight_dtype, learning_rates)


def learning_rate_table(
    lr: float, lr_scheduler: str, *, num_warmup_steps: int, num_training_steps: int, num_cycles: int, power: float
) -> list[float]:
    """The learning rate of each of `num_training_steps` updates, by diffusers' schedule of that name."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = get_scheduler(
        lr_scheduler,
        optimizer,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
        power=power,
    )
    table = []
    for _ in range(num_training_steps):
        table.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return table
