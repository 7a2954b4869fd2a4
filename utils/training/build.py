"""What is trained: the UNet, its flat parameters, its optimizer with the learning rate of every update, boosted."""

import functools
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.utils.checkpoint import checkpoint

from utils.models import fused_unet, loading
from utils.models.folder import BaseModel
from utils.runtime.colossal import boost
from utils.training.flat_parameters import FlatParameters
from utils.training.optimizer import MasterWeightsOptimizer


def build_unet(
    base: BaseModel,
    weight_dtype: torch.dtype,
    device: torch.device,
    learning_rates: Mapping[str, Any],
    ahead: Future | None = None,
    *,
    gradient_checkpointing: bool = False,
    offload_optimizer: str = "none",
    use_8bit_adam: bool = False,
    **adamw: Any,
) -> tuple[Any, MasterWeightsOptimizer, Any]:
    """fp32 masters from the file's own weights, the UNet itself in `weight_dtype`, boosted with the TorchDDP plugin.

    Args:
        learning_rates: learning_rate_table's arguments.
        ahead: will be what read_onto returns of the UNet's files; without it they are read now.
        adamw: MasterWeightsOptimizer's: betas, eps, weight_decay, max_grad_norm.

    Returns the boosted UNet, its optimizer and the Booster.
    """
    unet = loading.load_unet(base, ahead.result() if ahead else None)
    if gradient_checkpointing:
        enable_gradient_checkpointing(unet)
    on_gpu = device.type == "cuda"
    flat = FlatParameters(
        unet,
        weight_dtype,
        device,
        torch.channels_last if on_gpu else torch.contiguous_format,
        scattered_grads=on_gpu,
        offload_optimizer=offload_optimizer,
    )
    if ahead:
        torch.cuda.empty_cache()  # of them: what comes next is of other sizes
    if on_gpu:
        fused_unet.install(unet)
    optimizer = MasterWeightsOptimizer(
        flat, learning_rates=learning_rate_table(**learning_rates), use_8bit_adam=use_8bit_adam, **adamw
    )
    return boost(unet, optimizer)


def enable_gradient_checkpointing(unet: Any) -> None:
    """Recomputes activations in the backward pass.

    The random state is not saved and restored, which a CUDA graph could not capture: the UNet draws nothing.
    """
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    try:
        unet.enable_gradient_checkpointing(recompute)
    except TypeError:  # diffusers before 0.33 has a function of its own
        unet.enable_gradient_checkpointing()


def learning_rate_table(lr: float, lr_scheduler: str, *, num_training_steps: int, **schedule: float) -> list[float]:
    """The learning rate of each update, by diffusers' schedule of that name; `schedule` are get_scheduler's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_scheduler(lr_scheduler, optimizer, num_training_steps=num_training_steps, **schedule)
    (factor,) = scheduler.lr_lambdas  # not asked for a step after the last: polynomial's may divide by zero there
    return [lr * factor(step) for step in range(num_training_steps)]
