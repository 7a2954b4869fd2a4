"""Fused operations of the UNet: Triton kernels on a GPU, the same in plain torch elsewhere.

Images are [B, C, H, W] and run channels_last in and out; statistics and sums are fp32; nothing uses float atomics, so
results are bit-reproducible; nothing syncs the host, so everything can be captured in a CUDA graph. Without Triton, on
a CPU and for shapes the kernels are not made for, the plain torch definition runs.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.runtime.gpu import missing_for_triton

# Triton 3.10 will no longer join a product and a sum into one instruction unless told to, and results would change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton

    from utils.kernels.elementwise import AddBiasResidual, Geglu
    from utils.kernels.group_norm import MAX_GROUP_CHANNELS, GroupNorm
    from utils.kernels.layer_norm import MAX_FEATURES, AddLayerNorm
    from utils.kernels.short_attention import ShortAttention, is_short

    _is_new = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 2)  # 3.0, 3.1: the compiler itself aborts
    HAS_TRITON = _is_new and (not torch.cuda.is_available() or missing_for_triton() is None)
except ImportError:
    HAS_TRITON = False

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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
