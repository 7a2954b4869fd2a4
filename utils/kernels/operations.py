"""Fused operations of the UNet, and updates of its flat buffers: Triton on a GPU, the same in plain torch elsewhere.

Images are [B, C, H, W] and run channels_last in and out; statistics and sums are fp32; nothing uses float atomics, so
results are bit-reproducible; nothing syncs the host, so everything can be captured in a CUDA graph. Without Triton, on
a CPU and for shapes the kernels are not made for, the plain torch definition runs. Linear layers, without a bias, are
torch's: several of one input are one product, and gradients are written where they will be read. Updates are AdamW,
AdamW with moments in 8 bits, and the gradient's norm: by Triton of gradients in an adamw.GradientTable, else of a flat
one.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels.rounding import join, split_
from utils.runtime.gpu import missing_for_triton

# Triton 3.10 will no longer join a product and a sum into one instruction unless told to, and results would change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton

    from utils.kernels import adamw, adamw_8bit
    from utils.kernels.elementwise import AddBiasResidual, Geglu
    from utils.kernels.group_norm import MAX_GROUP_CHANNELS, GroupNorm
    from utils.kernels.layer_norm import MAX_FEATURES, AddLayerNorm
    from utils.kernels.short_attention import ShortAttention, is_short

    _is_new = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 2)  # 3.0, 3.1: the compiler itself aborts
    HAS_TRITON = _is_new and (not torch.cuda.is_available() or missing_for_triton() is None)
except ImportError:
    HAS_TRITON = False

GRAD_PLACE = "grad_place"  # a weight's attribute: where its gradient is to be written, of its shape and strides
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHUNK = 1 << 18  # elements of AdamW at a time: five fp32 buffers of this size stay in a CPU's cache
_ROW = 1 << 10  # elements of a gradient whose squares are added in fp32
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x: Tensor) -> bool:
    """Whether the kernels take this tensor: on a GPU, or anywhere under Triton's interpreter."""
    return HAS_TRITON and (x.is_cuda or _INTERPRETED) and x.dtype in _DTYPES and x.numel() > 0


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    shift_bias: Tensor | None = None,
    fork: bool = False,
) -> Any:
    """GroupNorm, then SiLU if `silu`, of x + shift + shift_bias.

    Args:
        x: [B, C, H, W]; anything but channels_last is copied once.
        weight, bias: [C].
        shift: [B, C] or None, e.g. a time embedding.
        shift_bias: [C] or None, e.g. the bias of the convolution that made x.
        fork: also return x, for its other use: the gradient of that use is then added inside the backward kernel.
    """
    if runs_triton(x) and x.shape[1] // num_groups <= MAX_GROUP_CHANNELS:
        x = x.contiguous(memory_format=torch.channels_last)
        shift = shift.contiguous() if shift is not None and shift.stride(1) != 1 else shift
        return GroupNorm.apply(x, weight, bias, shift, shift_bias, num_groups, eps, silu, fork)
    shifted = x
    for addend in (shift, shift_bias):
        shifted = shifted if addend is None else shifted + addend[..., None, None]
    y = F.group_norm(shifted, num_groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return (y, x) if fork else y


def add_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, x_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns s = x + x_bias + residual and LayerNorm(s). x, residual: [..., D]; the others: [D]."""
    if runs_triton(x) and x.shape[-1] <= MAX_FEATURES:
        residual = None if residual is None else residual.contiguous()
        return AddLayerNorm.apply(x.contiguous(), weight, bias, residual, x_bias, eps)
    for addend in (x_bias, residual):
        x = x if addend is None else x + addend
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + bias, [..., 2D] -> [..., D]: the first half times gelu (exact, with erf) of the second."""
    if runs_triton(x):
        return Geglu.apply(x.contiguous(), bias)
    hidden, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def add_bias_residual(
    x: Tensor, residual: Tensor, bias: Tensor | None = None, residual_bias: Tensor | None = None
) -> Tensor:
    """x + bias + residual + residual_bias; x, residual: [B, C, H, W] of one dtype, biases: [C] or None."""
    if runs_triton(x):
        x, residual = (image.contiguous(memory_format=torch.channels_last) for image in (x, residual))
        return AddBiasResidual.apply(x, residual, bias, residual_bias)
    for addend in (bias, residual_bias):
        x = x if addend is None else x + addend[:, None, None]
    return x + residual


def add_bias_residual_of_tokens(x: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    """As add_bias_residual, of x and residual [B, T, D], bias [D]."""
    x, residual = (tokens.transpose(1, 2).unsqueeze(-1) for tokens in (x, residual))
    return add_bias_residual(x, residual, bias).squeeze(-1).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """scaled_dot_product_attention of query [B, H, T, D], key and value [B, H, S, D] -> [B, H, T, D]."""
    if query.requires_grad and runs_triton(query) and is_short(query, key):
        return ShortAttention.apply(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


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


def shaped(flat: Tensor, parameter: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A parameter's part of a buffer, without copying: in its shape, and, if it is 4-D, in this memory format."""
    if parameter.dim() == 4 and memory_format == torch.channels_last:
        n, c, h, w = parameter.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(parameter.shape)


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


def gradient_table(numels: list[int], dtype: torch.dtype, device: torch.device | str) -> Any:
    """An adamw.GradientTable for parameters of `numels` elements each; None without Triton."""
    return adamw.GradientTable(numels, dtype, device) if HAS_TRITON else None


@torch.no_grad()
def adamw_(
    weight: Tensor,
    remainder: Tensor | None,
    grad: Any,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    first: int = 0,
) -> None:
    """One AdamW step, as torch defines it, in place over flat [N] buffers.

    Args:
        weight, remainder: the fp32 masters as kernels.rounding splits them; without a remainder the weights, fp32, are
            the masters.
        grad: in the weight's dtype or fp32, multiplied by grad_scale; or a gradient_table.
        exp_avg, exp_avg_sq: fp32.
        scalars: fp32 [10]: grad_scale, lr, beta1, beta2, eps, weight_decay, 1 - beta1**t, sqrt(1 - beta2**t), apply,
            and how many updates there are after this one. With apply 0 nothing changes, whatever the gradient holds.
        first: where the buffers begin in the flat buffer of all parameters.
    """
    if not isinstance(grad, Tensor):
        grad.adamw_(weight, remainder, exp_avg, exp_avg_sq, scalars)
        return
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
    weight: Tensor, remainder: Tensor | None, grad: Any, exp_avg: Any, exp_avg_sq: Any, scalars: Tensor
) -> None:
    """As adamw_, with moments that are packed.EightBit, rounded after their use: 14 bytes a parameter."""
    if not isinstance(grad, Tensor):
        adamw_8bit.adamw_8bit_(weight, remainder, grad, exp_avg, exp_avg_sq, scalars)
        return
    for piece in exp_avg.pieces():
        moments = exp_avg[piece].unpack(), exp_avg_sq[piece].unpack()
        rest = None if remainder is None else remainder[piece]
        adamw_(weight[piece], rest, grad[piece], *moments, scalars, piece.start)
        for eight_bit, values in zip((exp_avg, exp_avg_sq), moments, strict=True):
            eight_bit[piece].pack_(values)


def grad_norm_(grad: Any, out: Tensor) -> None:
    """out[0] = the fp32 Euclidean norm of the flat grad [N], or of a gradient_table's; inf and NaN propagate."""
    if not isinstance(grad, Tensor):
        grad.grad_norm_(out)
        return
    # A norm of norms: torch adds all squares of a row into a few fp32 numbers, too few for a whole model's.
    whole = grad.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(grad[:whole].view(-1, _ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(grad[whole:], dim=0, keepdim=True, dtype=torch.float32)
    out[0] = torch.linalg.vector_norm(torch.cat([rows, rest]), dtype=torch.float64)
