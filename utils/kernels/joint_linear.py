"""Several linear layers of one input as one product, if their weights lie side by side in memory."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _JointLinear(torch.autograd.Function):
    """x @ cat(weights).T by one product, for weights that are neighbours in memory: no copy is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return F.linear(x, _joint(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = (rows @ _joint(weights)).view(x.shape) if ctx.needs_input_grad[0] else None
        dweights = (rows.t() @ x.flatten(0, -2)).split([weight.shape[0] for weight in weights])
        return dx, *dweights


def _joint(weights: Sequence[Tensor]) -> Tensor:
    """One view [sum of O, D] of neighbouring weights [O, D]."""
    first = weights[0]
    return first.as_strided((sum(weight.shape[0] for weight in weights), first.shape[1]), (first.shape[1], 1))


def are_neighbours(weights: Sequence[Tensor]) -> bool:
    """Whether the weights lie one after the other in one buffer."""
    ends = [weight.data_ptr() + weight.numel() * weight.element_size() for weight in weights]
    same_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    starts = [weight.data_ptr() for weight in weights]
    return same_storage and starts[1:] == ends[:-1] and all(weight.is_contiguous() for weight in weights)


def project(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """What linear layers of weights [O, D], without a bias, make of x [B, T, D]: [B, T, O] each.

    One product if the weights are neighbours in memory.
    """
    if len(weights) == 1 or not are_neighbours(weights):
        return tuple(F.linear(x, weight) for weight in weights)
    joint = _JointLinear.apply(x, *weights)
    if len({weight.shape[0] for weight in weights}) == 1:
        return joint.unflatten(-1, (len(weights), -1)).unbind(-2)
    return joint.split([weight.shape[0] for weight in weights], dim=-1)
