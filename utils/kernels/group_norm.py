"""GroupNorm (+ SiLU) over channels_last images by Triton: two kernels forward, two backward, no atomics.

An image is cut into tiles of ROWS pixels x whole groups, TILE channels: 120 for nearly every layer of Stable Diffusion
(groups of 10, 20, 30, 40 or 60 channels), so that one compiled kernel serves them all with vector loads. Each tile
writes partial sums; the next kernel adds them up in a fixed order. A tile's moments are taken about its own mean and
merged, so a large mean costs no precision. B images, G groups of CG channels, C = G x CG channels, S chunks of ROWS
pixels; CB and KP are TILE and the number of a tile's groups, rounded up to powers of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_GROUP_CHANNELS = 512  # above it, a tile no longer fits into registers
_WANTED_PROGRAMS = 264  # two for each of an H100's processors
_STEP = tl.constexpr(32)  # chunks added up at a time
REDUCED = tl.constexpr(32)  # channels whose parameters' gradients one program reduces
_SIZES = [
    "CG",
    "images",
    "num_chunks",
    "num_blocks",
    "num_reducers",
]  # one compilation for all


@triton.jit
def _to_groups(values, group, KP: tl.constexpr):
    """[CB] -> [KP]: the sum over each group's channels."""
    return tl.sum(tl.where(tl.arange(0, KP)[:, None] == group[None, :], values[None, :], 0.0), 1)


@triton.jit
def _to_channels(values, group, KP: tl.constexpr):
    """[KP] -> [CB]: each channel gets its group's value."""
    return tl.sum(tl.where(group[:, None] == tl.arange(0, KP)[None, :], values[None, :], 0.0), 1)


@triton.jit
def _tile(block, chunk, pixels, C, CG, TILE: tl.constexpr, CB: tl.constexpr, ROWS: tl.constexpr):
    """A tile's lanes: local group, channel [CB]; offset into an image, mask [ROWS, CB]; mask of channels [CB]."""
    lane = tl.arange(0, CB)
    channel = block * TILE + lane
    inside = (lane < TILE) & (channel < C)
    row = chunk * ROWS + tl.arange(0, ROWS)
    return lane // CG, channel, row[:, None] * C + channel[None, :], (row < pixels)[:, None] & inside[None, :], inside


@triton.jit
def _tile_groups(block, G: tl.constexpr, CG, TILE: tl.constexpr, KP: tl.constexpr):
    """A tile's groups [KP], and which of them exist."""
    index = tl.arange(0, KP)
    group = block * (TILE // CG) + index
    return group, (index < TILE // CG) & (group < G)


@triton.jit
def _load(x_ptr, shift_ptr, shift_bias_ptr, image, pixels, channel, offset, mask, inside, C, SHIFT: tl.constexpr,
          SHIFT_BIAS: tl.constexpr):
    """x + shift of a tile, in fp32."""
    x = tl.load(x_ptr + image.to(tl.int64) * pixels * C + offset, mask=mask, other=0.0).to(tl.float32)
    if SHIFT:
        x += tl.load(shift_ptr + image * C + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SHIFT_BIAS:
        x += tl.load(shift_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=_SIZES)
def _moments(x_ptr, shift_ptr, shift_bias_ptr, part_ptr, pixels, num_chunks, CG, G: tl.constexpr, TILE: tl.constexpr,
             CB: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr,
             SHIFT_BIAS: tl.constexpr):
    """Of each tile and group: its mean and its sum of squared distances from that mean -> part [B, S, 2, G]."""
    block, chunk, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C = G * CG
    lane_group, channel, offset, mask, inside = _tile(block, chunk, pixels, C, CG, TILE, CB, ROWS)
    x = _load(x_ptr, shift_ptr, shift_bias_ptr, image, pixels, channel, offset, mask, inside, C, SHIFT, SHIFT_BIAS)
    count = tl.minimum(ROWS, pixels - chunk * ROWS) * CG
    mean = _to_groups(tl.sum(tl.where(mask, x, 0.0), 0), lane_group, KP) / count
    distance = tl.where(mask, x - _to_channels(mean, lane_group, KP)[None, :], 0.0)
    squares = _to_groups(tl.sum(distance * distance, 0), lane_group, KP)
    group, exists = _tile_groups(block, G, CG, TILE, KP)
    at = part_ptr + (image * num_chunks + chunk) * (2 * G) + group
    tl.store(at, mean, mask=exists)
    tl.store(at + G, squares, mask=exists)


@triton.jit
def _merge_moments(part_ptr, image, pixels, num_chunks, group, exists, eps, CG, G: tl.constexpr, KP: tl.constexpr,
                   ROWS: tl.constexpr):
    """Mean and rstd [KP] over all chunks of an image."""
    mean = tl.zeros((KP,), tl.float32)
    squares = tl.zeros((KP,), tl.float32)
    for first in range(0, num_chunks, _STEP):
        chunk = first + tl.arange(0, _STEP)
        count = (tl.maximum(tl.minimum(ROWS, pixels - chunk * ROWS), 0) * CG).to(tl.float32)[:, None]
        at = part_ptr + (image * num_chunks + chunk)[:, None] * (2 * G) + group[None, :]
        mean += tl.sum(count * tl.load(at, mask=(chunk < num_chunks)[:, None] & exists[None, :], other=0.0), 0)
    mean = mean / (pixels * CG)
    for first in range(0, num_chunks, _STEP):
        chunk = first + tl.arange(0, _STEP)
        count = (tl.maximum(tl.minimum(ROWS, pixels - chunk * ROWS), 0) * CG).to(tl.float32)[:, None]
        at = part_ptr + (image * num_chunks + chunk)[:, None] * (2 * G) + group[None, :]
        mask = (chunk < num_chunks)[:, None] & exists[None, :]
        distance = tl.load(at, mask=mask, other=0.0) - mean[None, :]
        squares += tl.sum(tl.load(at + G, mask=mask, other=0.0) + count * distance * distance, 0)
    return mean, 1.0 / tl.sqrt_rn(squares / (pixels * CG) + eps)


@triton.jit(do_not_specialize=_SIZES)
def _normalise(x_ptr, shift_ptr, shift_bias_ptr, weight_ptr, bias_ptr, part_ptr, y_ptr, mean_ptr, rstd_ptr, pixels,
               num_chunks, eps, CG, G: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr, KP: tl.constexpr,
               ROWS: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr, SHIFT_BIAS: tl.constexpr):
    """Merges the moments of an image's tiles and writes y; an image's first tiles also store mean and rstd [B, G]."""
    block, chunk, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C = G * CG
    group, exists = _tile_groups(block, G, CG, TILE, KP)
    mean, rstd = _merge_moments(part_ptr, image, pixels, num_chunks, group, exists, eps, CG, G, KP, ROWS)
    if chunk == 0:
        tl.store(mean_ptr + image * G + group, mean, mask=exists)
        tl.store(rstd_ptr + image * G + group, rstd, mask=exists)
    lane_group, channel, offset, mask, inside = _tile(block, chunk, pixels, C, CG, TILE, CB, ROWS)
    x = _load(x_ptr, shift_ptr, shift_bias_ptr, image, pixels, channel, offset, mask, inside, C, SHIFT, SHIFT_BIAS)
    scale = _to_channels(rstd, lane_group, KP) * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    y = (x - _to_channels(mean, lane_group, KP)[None, :]) * scale[None, :]
    y += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + image.to(tl.int64) * pixels * C + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(dy_ptr, x, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image, pixels, channel, offset, mask, inside, C,
               CG, G: tl.constexpr, SILU: tl.constexpr):
    """Of a tile: the normalised input, the gradient of the affine output (both [ROWS, CB]), weight and rstd [CB]."""
    mean = tl.load(mean_ptr + image * G + channel // CG, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + image * G + channel // CG, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    normalised = tl.where(mask, (x - mean[None, :]) * rstd[None, :], 0.0)
    grad = tl.load(dy_ptr + image.to(tl.int64) * pixels * C + offset, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        y = normalised * weight[None, :] + bias[None, :]
        sigmoid = tl.sigmoid(y)
        grad = grad * sigmoid * (1.0 + y * (1.0 - sigmoid))
    return normalised, grad, weight, rstd


@triton.jit(do_not_specialize=_SIZES)
def _backward_sums(dy_ptr, x_ptr, shift_ptr, shift_bias_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
                   channel_part_ptr, group_part_ptr, pixels, num_chunks, CG, G: tl.constexpr, TILE: tl.constexpr,
                   CB: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr,
                   SHIFT_BIAS: tl.constexpr):
    """Of each tile: sums over pixels of grad, grad x normalised, normalised -> channel_part [B, S, 3, C]; the first
    two, weighted, by group -> group_part [B, S, 2, G]."""
    block, chunk, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C = G * CG
    lane_group, channel, offset, mask, inside = _tile(block, chunk, pixels, C, CG, TILE, CB, ROWS)
    x = _load(x_ptr, shift_ptr, shift_bias_ptr, image, pixels, channel, offset, mask, inside, C, SHIFT, SHIFT_BIAS)
    normalised, grad, weight, _ = _gradients(dy_ptr, x, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image, pixels,
                                             channel, offset, mask, inside, C, CG, G, SILU)
    grads = tl.sum(grad, 0)
    products = tl.sum(grad * normalised, 0)
    at = channel_part_ptr + (image * num_chunks + chunk) * (3 * C) + channel
    tl.store(at, grads, mask=inside)
    tl.store(at + C, products, mask=inside)
    if SHIFT or SHIFT_BIAS:
        tl.store(at + 2 * C, tl.sum(normalised, 0), mask=inside)
    group, exists = _tile_groups(block, G, CG, TILE, KP)
    at = group_part_ptr + (image * num_chunks + chunk) * (2 * G) + group
    tl.store(at, _to_groups(grads * weight, lane_group, KP), mask=exists)
    tl.store(at + G, _to_groups(products * weight, lane_group, KP), mask=exists)


@triton.jit
def _group_means(part_ptr, image, num_chunks, group, exists, count, G: tl.constexpr, WIDTH: tl.constexpr):
    """The two sums of part [B, S, 2, G] over an image's chunks, divided by count, at each of WIDTH groups."""
    s1 = tl.zeros((WIDTH,), tl.float32)
    s2 = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, num_chunks, _STEP):
        chunk = first + tl.arange(0, _STEP)
        mask = (chunk < num_chunks)[:, None] & exists[None, :]
        at = part_ptr + (image * num_chunks + chunk)[:, None] * (2 * G) + group[None, :]
        s1 += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        s2 += tl.sum(tl.load(at + G, mask=mask, other=0.0), 0)
    return s1 / count, s2 / count


@triton.jit
def _parameter_grads(block, rstd_ptr, weight_ptr, channel_part_ptr, group_part_ptr, dweight_ptr, dbias_ptr, dshift_ptr,
                     dshift_bias_ptr, images, pixels, num_chunks, CG, G: tl.constexpr, SHIFT: tl.constexpr,
                     SHIFT_BIAS: tl.constexpr):
    """The gradients of some channels' weight, bias and shifts, from the sums of all tiles. A shift's gradient is the
    sum of dx over pixels, which needs no dx: rstd (weight sum(grad) - pixels m1 - m2 sum(normalised))."""
    C = G * CG
    channel = block * REDUCED + tl.arange(0, REDUCED)
    inside = channel < C
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((REDUCED,), tl.float32)
    dbias = tl.zeros((REDUCED,), tl.float32)
    dshift_bias = tl.zeros((REDUCED,), tl.float32)
    for image in range(images):
        grads = tl.zeros((REDUCED,), tl.float32)
        sums = tl.zeros((REDUCED,), tl.float32)
        for first in range(0, num_chunks, _STEP):
            chunk = first + tl.arange(0, _STEP)
            mask = (chunk < num_chunks)[:, None] & inside[None, :]
            at = channel_part_ptr + (image * num_chunks + chunk)[:, None] * (3 * C) + channel[None, :]
            grads += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
            dweight += tl.sum(tl.load(at + C, mask=mask, other=0.0), 0)
            if SHIFT or SHIFT_BIAS:
                sums += tl.sum(tl.load(at + 2 * C, mask=mask, other=0.0), 0)
        dbias += grads
        if SHIFT or SHIFT_BIAS:
            m1, m2 = _group_means(group_part_ptr, image, num_chunks, channel // CG, inside, pixels * CG, G, REDUCED)
            rstd = tl.load(rstd_ptr + image * G + channel // CG, mask=inside, other=0.0)
            dshift = rstd * (weight * grads - pixels * m1 - m2 * sums)
            dshift_bias += dshift
            if SHIFT:
                tl.store(dshift_ptr + image * C + channel, dshift.to(dshift_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
    if SHIFT_BIAS:
        tl.store(dshift_bias_ptr + channel, dshift_bias.to(dshift_bias_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _backward(dy_ptr, x_ptr, residual_grad_ptr, shift_ptr, shift_bias_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
              channel_part_ptr, group_part_ptr, dx_ptr, dweight_ptr, dbias_ptr, dshift_ptr, dshift_bias_ptr, images,
              pixels, num_chunks, num_blocks, num_reducers, CG, G: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr,
              KP: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr, RESIDUAL: tl.constexpr, SHIFT: tl.constexpr,
              SHIFT_BIAS: tl.constexpr):
    """The first `num_reducers` programs reduce the parameters' gradients, each of the others writes one tile of dx."""
    program = tl.program_id(0)
    C = G * CG
    if program < num_reducers:
        _parameter_grads(program, rstd_ptr, weight_ptr, channel_part_ptr, group_part_ptr, dweight_ptr, dbias_ptr,
                         dshift_ptr, dshift_bias_ptr, images, pixels, num_chunks, CG, G, SHIFT,
                         SHIFT_BIAS)
    else:
        tile = program - num_reducers
        block = tile % num_blocks
        chunk = (tile // num_blocks) % num_chunks
        image = tile // (num_blocks * num_chunks)
        lane_group, channel, offset, mask, inside = _tile(block, chunk, pixels, C, CG, TILE, CB, ROWS)
        x = _load(x_ptr, shift_ptr, shift_bias_ptr, image, pixels, channel, offset, mask, inside, C, SHIFT, SHIFT_BIAS)
        normalised, grad, weight, rstd = _gradients(dy_ptr, x, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image, pixels,
                                                    channel, offset, mask, inside, C, CG, G, SILU)
        group, exists = _tile_groups(block, G, CG, TILE, KP)
        m1, m2 = _group_means(group_part_ptr, image, num_chunks, group, exists, pixels * CG, G, KP)
        m1, m2 = _to_channels(m1, lane_group, KP), _to_channels(m2, lane_group, KP)
        dx = rstd[None, :] * (grad * weight[None, :] - m1[None, :] - normalised * m2[None, :])
        at = image.to(tl.int64) * pixels * C + offset
        if RESIDUAL:
            dx += tl.load(residual_grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


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
    )
    return constants, num_blocks, triton.cdiv(pixels, rows)


class GroupNorm(torch.autograd.Function):
    """x [B, C, H, W] channels_last -> y; with `fork` also x, whose gradient is then added inside the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        shift_bias: Tensor | None,
        num_groups: int,
        eps: float,
        silu: bool,
        fork: bool,
    ) -> Any:
        images, channels, height, width = x.shape
        constants, num_blocks, num_chunks = _tiling(images, channels, height * width, num_groups)
        flags = dict(SHIFT=shift is not None, SHIFT_BIAS=shift_bias is not None)
        part = torch.empty(images, num_chunks, 2, num_groups, dtype=torch.float32, device=x.device)
        mean = torch.empty(images, num_groups, dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        grid = (num_blocks, num_chunks, images)
        _moments[grid](x, shift, shift_bias, part, height * width, num_chunks, **constants, **flags)
        _normalise[grid](
            x, shift, shift_bias, weight, bias, part, y, mean, rstd, height * width, num_chunks, eps,
            SILU=silu, **constants, **flags,
        )
        ctx.save_for_backward(x, weight, bias, shift, shift_bias, mean, rstd)
        ctx.num_groups, ctx.silu = num_groups, silu
        ctx.set_materialize_grads(False)
        return (y, x) if fork else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, residual_grad: Tensor | None = None) -> Any:
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
        _backward_sums[(num_blocks, num_chunks, images)](
            dy, x, shift, shift_bias, mean, rstd, weight, bias, channel_part, group_part, height * width, num_chunks,
            **constants, **flags,
        )
        num_reducers = triton.cdiv(channels, REDUCED.value)
        _backward[(num_reducers + num_blocks * num_chunks * images,)](
            dy, x, residual_grad, shift, shift_bias, mean, rstd, weight, bias, channel_part, group_part, dx, dweight,
            dbias, dshift, dshift_bias, images, height * width, num_chunks, num_blocks, num_reducers,
            RESIDUAL=residual_grad is not None, **constants, **flags,
        )
        return dx, dweight, dbias, dshift, dshift_bias, None, None, None, None
