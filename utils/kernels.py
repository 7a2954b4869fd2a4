"""Fused operations of the UNet and the optimizer: Triton kernels on a GPU, the same in plain torch elsewhere.

Images are [B, C, H, W] and run channels_last in and out; statistics and sums are fp32; nothing uses float atomics, so
results are bit-reproducible; nothing syncs the host, so everything can be captured in a CUDA graph. Without Triton, on
a CPU and for shapes the kernels are not made for, the plain torch definition runs.
"""

import os

import torch
import torch.nn.functional as F

try:
    import triton

    from utils import (
        kernels_eight_bit,
        kernels_elementwise,
        kernels_group_norm,
        kernels_layer_norm,
        kernels_optimizer,
        kernels_scattered,
    )

    HAS_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 2)  # 3.0, 3.1: the compiler itself aborts
except ImportError:
    HAS_TRITON = False

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHUNK = 1 << 18  # elements of plain AdamW at a time: five fp32 buffers of this size stay in a CPU's cache
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def gradient_table(numels, device):
    """A kernels_scattered.GradientTable for parameters of `numels` elements each; None without Triton."""
    return kernels_scattered.GradientTable(numels, device) if HAS_TRITON else None


def runs_triton(x: torch.Tensor) -> bool:
    """Whether the kernels take this tensor: on a GPU, or anywhere under Triton's interpreter."""
    return HAS_TRITON and (x.is_cuda or _INTERPRETED) and x.dtype in _DTYPES and x.numel() > 0


def group_norm(x, weight, bias, num_groups, eps, silu, shift=None, shift_bias=None, fork=False):
    """GroupNorm, then SiLU if `silu`, of x + shift + shift_bias.

    Args:
        x: [B, C, H, W]; anything but channels_last is copied once.
        weight, bias: [C].
        shift: [B, C] or None, e.g. a time embedding.
        shift_bias: [C] or None, e.g. the bias of the convolution that made x.
        fork: also return x, for its other use: the gradient of that use is then added inside the backward kernel.
    """
    if runs_triton(x) and x.shape[1] // num_groups <= kernels_group_norm.MAX_GROUP_CHANNELS:
        x = x.contiguous(memory_format=torch.channels_last)
        shift = None if shift is None else shift.contiguous()
        return kernels_group_norm.GroupNorm.apply(x, weight, bias, shift, shift_bias, num_groups, eps, silu, fork)
    shifted = x
    for addend in (shift, shift_bias):
        shifted = shifted if addend is None else shifted + addend[..., None, None]
    y = F.group_norm(shifted, num_groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return (y, x) if fork else y


def add_layer_norm(x, weight, bias, eps, residual=None, x_bias=None):
    """Returns s = x + x_bias + residual and LayerNorm(s). x, residual: [..., D]; the others: [D]."""
    if runs_triton(x) and x.shape[-1] <= kernels_layer_norm.MAX_FEATURES:
        residual = None if residual is None else residual.contiguous()
        return kernels_layer_norm.AddLayerNorm.apply(x.contiguous(), weight, bias, residual, x_bias, eps)
    for addend in (x_bias, residual):
        x = x if addend is None else x + addend
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def geglu(x):
    """[..., 2D] -> [..., D]: the first half times gelu (exact, with erf) of the second."""
    if runs_triton(x):
        return kernels_elementwise.Geglu.apply(x.contiguous())
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def add_bias_residual(x, residual, bias=None, residual_bias=None):
    """x + bias + residual + residual_bias; x, residual: [B, C, H, W] of one dtype, biases: [C] or None."""
    if runs_triton(x):
        x, residual = (image.contiguous(memory_format=torch.channels_last) for image in (x, residual))
        return kernels_elementwise.AddBiasResidual.apply(x, residual, bias, residual_bias)
    for addend in (bias, residual_bias):
        x = x if addend is None else x + addend[:, None, None]
    return x + residual


def adamw_(weight, grad, master, exp_avg, exp_avg_sq, scalars):
    """One AdamW step, as torch defines it, in place over flat [N] buffers: 28 bytes a parameter.

    Args:
        weight: fp16 or bf16, receives the rounded master; None where the master is the weight.
        grad: in the weight's dtype or fp32, multiplied by grad_scale.
        master, exp_avg, exp_avg_sq: fp32; on a GPU also in pinned host memory, where reaches_host_memory says so.
        scalars: fp32 [9]: grad_scale, lr, beta1, beta2, eps, weight_decay, 1 - beta1**t, sqrt(1 - beta2**t), apply.
            With apply 0 nothing changes, whatever the gradient holds.
    """
    if runs_triton(grad):
        kernels_optimizer.adamw_(weight, grad, master, exp_avg, exp_avg_sq, scalars)
    else:
        adamw_reference_(weight, grad, master, exp_avg, exp_avg_sq, scalars)


def adamw_8bit_(weight, grad, master, exp_avg, exp_avg_sq, scalars):
    """As adamw_, with moments that are eight_bit.EightBit, rounded after their use: 16 bytes a parameter."""
    if runs_triton(grad):
        kernels_eight_bit.adamw_8bit_(weight, grad, master, exp_avg, exp_avg_sq, scalars)
        return
    for piece in exp_avg.pieces():
        moments = exp_avg[piece].dequantize(), exp_avg_sq[piece].dequantize()
        weight_piece = None if weight is None else weight[piece]
        adamw_reference_(weight_piece, grad[piece], master[piece], *moments, scalars)
        for eight_bit, values in zip((exp_avg, exp_avg_sq), moments, strict=True):
            eight_bit[piece].quantize_(values)


def reaches_host_memory(device):
    """Whether kernels on this GPU can read and write the buffers of host_memory.pinned_zeros: tried, not assumed."""
    if not HAS_TRITON:
        return False
    from utils.host_memory import pinned_zeros

    x = pinned_zeros(256, torch.float32, device)
    try:
        with torch.cuda.device(device):
            kernels_optimizer.add_one_(x)
            torch.cuda.synchronize(device)
    except (RuntimeError, ValueError):
        return False
    return bool((x == 1).all())


def grad_norm_(grad, out):
    """out[0] = the fp32 Euclidean norm of the flat grad [N]; inf and NaN propagate."""
    if runs_triton(grad):
        kernels_optimizer.grad_norm_(grad, out)
    else:
        out[0] = torch.linalg.vector_norm(grad, dtype=torch.float32)


@torch.no_grad()
def adamw_reference_(weight, grad, master, exp_avg, exp_avg_sq, scalars):
    """adamw_ in plain torch: same arguments, same result to rounding, no host sync."""
    grad_scale, lr, beta1, beta2, eps, weight_decay, correction1, correction2_sqrt, apply = scalars.unbind()
    # An update that must not happen is one with decay factors 1, and gradient and learning rate 0.
    applies = apply != 0
    lr, grad_scale = torch.where(applies, lr, 0), torch.where(applies, grad_scale, 0)
    beta1, beta2 = torch.where(applies, beta1, 1), torch.where(applies, beta2, 1)
    step_size, decay = lr / correction1, 1 - lr * weight_decay
    buffers = (b.split(_CHUNK) for b in (master if weight is None else weight, grad, master, exp_avg, exp_avg_sq))
    for weight_, grad_, master_, exp_avg_, exp_avg_sq_ in zip(*buffers, strict=True):
        scaled = torch.where(applies, grad_.float(), 0).mul_(grad_scale)
        exp_avg_.mul_(beta1).add_(scaled * (1 - beta1))
        exp_avg_sq_.mul_(beta2).add_(scaled.square_().mul_(1 - beta2))
        denominator = exp_avg_sq_.sqrt().div_(correction2_sqrt).add_(eps)
        master_.mul_(decay).sub_(denominator.reciprocal_().mul_(exp_avg_).mul_(step_size))
        if weight is not None:
            weight_.copy_(master_)
