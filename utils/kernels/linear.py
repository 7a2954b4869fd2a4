"""Linear layers without a bias: several of one input as one product, and gradients written where they will be read."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GRAD_PLACE = "grad_place"  # a weight's attribute: where its gradient is to be written, of its shape and strides


class _Linear(torch.autograd.Function):
    """x @ cat(weights).T by one product: one weight [O, ...], or several that are neighbours in memory.

    The weights' gradients are written into their GRAD_PLACE, if all have one and no gradient yet: what is returned are
    views of it, which become the weights' gradients without a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return F.linear(x, _joint(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        rows, inputs = dy.flatten(0, -2), x.flatten(0, -2)
        dx = (rows @ _joint(weights)).view(x.shape) if ctx.needs_input_grad[0] else None
        places = [getattr(weight, GRAD_PLACE) for weight in weights if hasattr(weight, GRAD_PLACE)]
        has_place = len(places) == len(weights) and all(weight.grad is None for weight in weights)
        if has_place and are_neighbours(places):
            torch.mm(rows.t(), inputs, out=_joint(places))
            return dx, *(place.detach() for place in places)
        joint = (rows.t() @ inputs).split([weight.shape[0] for weight in weights])
        pairs = zip(joint, weights, strict=True)
        return dx, *(grad.as_strided(weight.shape, weight.stride()) for grad, weight in pairs)


def _joint(weights: Sequence[Tensor]) -> Tensor:
    """One view [sum of O, D] of neighbouring weights [O, D], or [O, D, 1, 1]."""
    first = weights[0]
    return first.as_strided((sum(weight.shape[0] for weight in weights), first.shape[1]), (first.shape[1], 1))


def are_neighbours(weights: Sequence[Tensor]) -> bool:
    """Whether the weights lie one after the other in one buffer."""
    ends = [weight.data_ptr() + weight.numel() * weight.element_size() for weight in weights]
    same_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    starts = [weight.data_ptr() for weight in weights]
    return same_storage and starts[1:] == ends[:-1] and all(weight.is_contiguous() for weight in weights)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D] times a linear layer's weight [O, D], or a 1x1 convolution's [O, D, 1, 1] -> [..., O]."""
    return _Linear.apply(x, weight)


def project(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """What linear layers of weights [O, D], without a bias, make of x [B, T, D]: [B, T, O] each.

    One product if the weights are neighbours in memory.
    """
    if not are_neighbours(weights):
        return tuple(linear(x, weight) for weight in weights)
    joint = _Linear.apply(x, *weights)
    if len({weight.shape[0] for weight in weights}) == 1:
        return joint.unflatten(-1, (len(weights), -1)).unbind(-2)
    return joint.split([weight.shape[0] for weight in weights], dim=-1)
