"""Updates of flat buffers: AdamW, AdamW with moments in 8 bits, and the gradient's norm.

Triton kernels on a GPU (AdamW's is adamw.GradientTable.adamw_), the same in plain torch elsewhere. No float atomics,
so results are bit-reproducible; nothing syncs the host, so everything can be captured in a CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor

from utils.kernels.operations import HAS_TRITON, runs_triton
from utils.kernels.rounding import join, split_

if HAS_TRITON:
    from utils.kernels import adamw, adamw_8bit

_CHUNK = 1 << 18  # elements of AdamW at a time: five fp32 buffers of this size stay in a CPU's cache


def gradient_table(numels: list[int], device: torch.device | str) -> Any:
    """An adamw.GradientTable for parameters of `numels` elements each; None without Triton."""
    return adamw.GradientTable(numels, device) if HAS_TRITON else None


@torch.no_grad()
def adamw_(
    weight: Tensor,
    remainder: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    first: int = 0,
) -> None:
    """One AdamW step, as torch defines it, in place over flat [N] buffers.

    Args:
        weight, remainder: the fp32 masters as kernels.rounding splits them; without a remainder the weights, fp32, are
            the masters.
        grad: in the weight's dtype or fp32, multiplied by grad_scale.
        exp_avg, exp_avg_sq: fp32.
        scalars: fp32 [10]: grad_scale, lr, beta1, beta2, eps, weight_decay, 1 - beta1**t, sqrt(1 - beta2**t), apply,
            and how many updates there are after this one. With apply 0 nothing changes, whatever the gradient holds.
        first: where the buffers begin in the flat buffer of all parameters.
    """
    grad_scale, lr, beta1, beta2, eps, weight_decay, correction1, correction2_sqrt, apply, number = scalars.unbind()
    # An update that must not happen is one with decay factors 1, and gradient and learning rate 0.
    applies = apply != 0
    lr, grad_scale = torch.where(applies, lr, 0), torch.where(applies, grad_scale, 0)
    beta1, beta2 = torch.where(applies, beta1, 1), torch.where(applies, beta2, 1)
    step_size, decay = lr / correction1, 1 - lr * weight_decay
    before = number - applies.float()
    rest = weight if remainder is None else remainder
    buffers = (buffer.split(_CHUNK) for buffer in (weight, rest, grad, exp_avg, exp_avg_sq))
    for weight_, rest_, grad_, exp_avg_, exp_avg_sq_ in zip(*buffers, strict=True):
        master = weight_ if remainder is None else join(weight_, rest_, before, first)
        scaled = torch.where(applies, grad_.float(), 0).mul_(grad_scale)
        exp_avg_.mul_(beta1).add_(scaled * (1 - beta1))
        exp_avg_sq_.mul_(beta2).add_(scaled.square_().mul_(1 - beta2))
        denominator = exp_avg_sq_.sqrt().div_(correction2_sqrt).add_(eps)
        master.mul_(decay).sub_(denominator.reciprocal_().mul_(exp_avg_).mul_(step_size))
        if remainder is not None:
            split_(weight_, rest_, master, number, first)
        first += master.numel()


def adamw_8bit_(
    weight: Tensor, remainder: Tensor | None, grad: Tensor, exp_avg: Any, exp_avg_sq: Any, scalars: Tensor
) -> None:
    """As adamw_, with moments that are packed.EightBit, rounded after their use: 14 bytes a parameter."""
    if runs_triton(grad):
        adamw_8bit.adamw_8bit_(weight, remainder, grad, exp_avg, exp_avg_sq, scalars)
        return
    for piece in exp_avg.pieces():
        moments = exp_avg[piece].unpack(), exp_avg_sq[piece].unpack()
        rest = None if remainder is None else remainder[piece]
        adamw_(weight[piece], rest, grad[piece], *moments, scalars, piece.start)
        for eight_bit, values in zip((exp_avg, exp_avg_sq), moments, strict=True):
            eight_bit[piece].pack_(values)


def grad_norm_(grad: Tensor, out: Tensor) -> None:
    """out[0] = the fp32 Euclidean norm of the flat grad [N]; inf and NaN propagate."""
    if runs_triton(grad):
        adamw.grad_norm_(grad, out)
    else:
        out[0] = torch.linalg.vector_norm(grad, dtype=torch.float32)
