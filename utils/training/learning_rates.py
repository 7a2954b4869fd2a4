"""The learning rate of every update, by diffusers' schedules."""

import torch
from diffusers.optimization import get_scheduler


def learning_rate_table(
    lr: float, lr_scheduler: str, *, num_warmup_steps: int, num_training_steps: int, num_cycles: int, power: float
) -> list[float]:
    """The learning rate of each of `num_training_steps` updates, by diffusers' schedule of that name."""
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
