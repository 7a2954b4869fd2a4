"""GroupNorm (+ SiLU) over channels_last images by Triton: two kernels forward, two backward, no atomics.

A tile is 120 channels wide for nearly every layer of Stable Diffusion (groups of 10, 20, 30, 40 or 60 channels), so
that one compiled kernel serves them all with vector loads.
"""

import torch
import triton
from torch.autograd.function import once_differentiable

from utils.kernels import group_norm_triton as kernels

MAX_GROUP_CHANNELS = 512  # above it, a tile no longer fits into registers
_WANTED_PROGRAMS = 264  # two for each of an H100's processors


def _tiling(images: int, channels: int, pixels: int, num_groups: int) -> tuple[dict, int, int]:
    """Kernel constants, number of channel blocks, number of pixel chunks."""
    group_channels = channels // num_groups
    groups = max(1, min(128 // group_channels, num_groups))
    num_blocks = triton.cdiv(num_groups, groups)
    width = triton.next_power_of_2(groups * group_channels)
    rows = 64 if width <= 128 else 32 if width <= 256 else 16
    while rows > 16 and (images * num_blocks * triton.cdiv(pixels, rows) < _WANTED_PROGRAMS or rows >= 2 * pixels):
        rows //= 2
    constants = dict(
        CG=group_channels, G=num_groups, TILE=groups * group_channels, CB=width,
        KP=max(16, triton.next_power_of_2(groups)), ROWS=rows, num_warps=8 if rows * width >= 4096 else 4,
    )  # fmt: skip
    return constants, num_blocks, triton.cdiv(pixels, rows)


class GroupNorm(torch.autograd.Function):
    """x [B, C, H, W] channels_last -> y; with `fork` also x, whose gradient is then added inside the kernel."""

    @staticmethod
    def forward(ctx, x, weight, bias, shift, shift_bias, num_groups, eps, silu, fork):
        images, channels, height, width = x.shape
        constants, num_blocks, num_chunks = _tiling(images, channels, height * width, num_groups)
        flags = dict(SHIFT=shift is not None, SHIFT_BIAS=shift_bias is not None)
        part = torch.empty(images, num_chunks, 2, num_groups, dtype=torch.float32, device=x.device)
        mean = torch.empty(images, num_groups, dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        grid = (num_blocks, num_chunks, images)
        kernels.moments[grid](x, shift, shift_bias, part, height * width, num_chunks, **constants, **flags)
        kernels.normalise[grid](
            x, shift, shift_bias, weight, bias, part, y, mean, rstd, height * width, num_chunks, eps,
            SILU=silu, **constants, **flags,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, shift, shift_bias, mean, rstd)
        ctx.num_groups, ctx.silu = num_groups, silu
        ctx.set_materialize_grads(False)
        return (y, x) if fork else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, residual_grad=None):
        x, weight, bias, shift, shift_bias, mean, rstd = ctx.saved_tensors
        if dy is None:
            return residual_grad, *[None] * 8
        images, channels, height, width = x.shape
        dy = dy.contiguous(memory_format=torch.channels_last)
        if residual_grad is not None:
            residual_grad = residual_grad.contiguous(memory_format=torch.channels_last)
        constants, num_blocks, num_chunks = _tiling(images, channels, height * width, ctx.num_groups)
        flags = dict(SILU=ctx.silu, SHIFT=shift is not None, SHIFT_BIAS=shift_bias is not None)
        channel_part = torch.empty(images, num_chunks, 3, channels, dtype=torch.float32, device=x.device)
        group_part = torch.empty(images, num_chunks, 2, ctx.num_groups, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        dshift = None if shift is None else torch.empty_like(shift)
        dshift_bias = None if shift_bias is None else torch.empty_like(shift_bias)
        kernels.backward_sums[(num_blocks, num_chunks, images)](
            dy, x, shift, shift_bias, mean, rstd, weight, bias, channel_part, group_part, height * width, num_chunks,
            **constants, **flags,
        )  # fmt: skip
        num_reducers = triton.cdiv(channels, kernels.REDUCED.value)
        kernels.backward[(num_reducers + num_blocks * num_chunks * images,)](
            dy, x, residual_grad, shift, shift_bias, mean, rstd, weight, bias, channel_part, group_part, dx, dweight,
            dbias, dshift, dshift_bias, images, height * width, num_chunks, num_blocks, num_reducers,
            RESIDUAL=residual_grad is not None, **constants, **flags,
        )  # fmt: skip
        return dx, dweight, dbias, dshift, dshift_bias, None, None, None, None
