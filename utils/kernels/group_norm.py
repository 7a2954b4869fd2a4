"""GroupNorm (+ SiLU) over channels_last images by Triton: two kernels forward, two backward, no atomics.

An image is cut into S chunks of `length` pixels x whole groups, TILE channels: 120 for nearly every layer of Stable
Diffusion (groups of 10, 20, 30, 40 or 60 channels), so that one compiled kernel serves them all with vector loads. A
program walks over its chunk, ROWS pixels at a time, and sums only when it has seen them all; the next kernel adds up
what the chunks' programs wrote, in a fixed order. Moments are Welford's running ones, merged about their common mean,
so a large mean costs no precision. B images, G groups of CG channels, C = G x CG channels; CB and KP are TILE and the
number of a tile's groups, rounded up to powers of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels.elementwise import chunks

MAX_GROUP_CHANNELS = 512  # above it, a tile no longer fits into registers
_WANTED_PROGRAMS = 264  # two for each of an H100's processors
_TILE_ELEMENTS, _STAGES = 2048, 3  # of a program: values in registers, and how many tiles are on their way
_STEP = tl.constexpr(32)  # chunks added up at a time
REDUCED = tl.constexpr(32)  # channels whose parameters' gradients one program reduces
_SIZES = ["CG", "images", "shift_row", "length", "num_chunks", "num_blocks", "num_reducers"]  # one compilation for all


@triton.jit
def _to_groups(values, group, KP: tl.constexpr):
    """[CB] -> [KP]: the sum over each group's channels."""
    return tl.sum(tl.where(tl.arange(0, KP)[:, None] == group[None, :], values[None, :], 0.0), 1)


@triton.jit
def _to_channels(values, group, KP: tl.constexpr):
    """[KP] -> [CB]: each channel gets its group's value."""
    return tl.sum(tl.where(group[:, None] == tl.arange(0, KP)[None, :], values[None, :], 0.0), 1)


@triton.jit
def _lanes(block, C, CG, TILE: tl.constexpr, CB: tl.constexpr):
    """A block's lanes [CB]: local group, channel, and which of them exist."""
    lane = tl.arange(0, CB)
    channel = block * TILE + lane
    return lane // CG, channel, (lane < TILE) & (channel < C)


@triton.jit
def _rows(first, end, channel, inside, C, ROWS: tl.constexpr):
    """Pixels from `first` on, before `end`, x a block's channels: offset into an image and mask, [ROWS, CB] each."""
    row = first + tl.arange(0, ROWS)
    return row[:, None] * C + channel[None, :], (row < end)[:, None] & inside[None, :]


@triton.jit
def _tile_groups(block, G: tl.constexpr, CG, TILE: tl.constexpr, KP: tl.constexpr):
    """A tile's groups [KP], and which of them exist."""
    index = tl.arange(0, KP)
    group = block * (TILE // CG) + index
    return group, (index < TILE // CG) & (group < G)


@triton.jit
def _shift(shift_ptr, shift_row, shift_bias_ptr, image, channel, inside, CB: tl.constexpr, SHIFT: tl.constexpr,
           SHIFT_BIAS: tl.constexpr):
    """What is added to each channel of an image, [CB] in fp32."""
    shift = tl.zeros((CB,), tl.float32)
    if SHIFT:
        shift += tl.load(shift_ptr + image * shift_row + channel, mask=inside, other=0.0).to(tl.float32)
    if SHIFT_BIAS:
        shift += tl.load(shift_bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return shift


@triton.jit(do_not_specialize=_SIZES)
def _moments(x_ptr, shift_ptr, shift_row, shift_bias_ptr, part_ptr, pixels, length, num_chunks, CG, G: tl.constexpr,
             TILE: tl.constexpr, CB: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
             SHIFT: tl.constexpr, SHIFT_BIAS: tl.constexpr):
    """Of each chunk and group: its mean and its sum of squared distances from that mean -> part [B, S, 2, G]."""
    block, chunk, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C = G * CG
    lane_group, channel, inside = _lanes(block, C, CG, TILE, CB)
    shift = _shift(shift_ptr, shift_row, shift_bias_ptr, image, channel, inside, CB, SHIFT, SHIFT_BIAS)
    x_ptr += image.to(tl.int64) * pixels * C
    first, end = chunk * length, tl.minimum((chunk + 1) * length, pixels)
    means = tl.zeros((ROWS, CB), tl.float32)
    squares = tl.zeros((ROWS, CB), tl.float32)
    seen = 0.0
    for row in tl.range(first, end, ROWS, num_stages=STAGES):
        offset, mask = _rows(row, end, channel, inside, C, ROWS)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) + shift[None, :]
        seen += 1.0
        distance = tl.where(mask, x - means, 0.0)
        means += distance * (1.0 / seen)
        squares += distance * tl.where(mask, x - means, 0.0)
    # Row r of `means` has seen the pixels first + r, first + r + ROWS, ...
    count = tl.maximum((end - first - tl.arange(0, ROWS) + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    mean = _to_groups(tl.sum(count * means, 0), lane_group, KP) / ((end - first) * CG)
    distance = tl.where(inside[None, :], means - _to_channels(mean, lane_group, KP)[None, :], 0.0)
    total = _to_groups(tl.sum(squares + count * distance * distance, 0), lane_group, KP)
    group, exists = _tile_groups(block, G, CG, TILE, KP)
    at = part_ptr + (image * num_chunks + chunk) * (2 * G) + group
    tl.store(at, mean, mask=exists)
    tl.store(at + G, total, mask=exists)


@triton.jit
def _merge_moments(part_ptr, image, pixels, length, num_chunks, group, exists, eps, CG, G: tl.constexpr,
                   KP: tl.constexpr):
    """Mean and rstd [KP] over all chunks of an image."""
    mean = tl.zeros((KP,), tl.float32)
    squares = tl.zeros((KP,), tl.float32)
    for first in range(0, num_chunks, _STEP):
        chunk = first + tl.arange(0, _STEP)
        count = (tl.maximum(tl.minimum(length, pixels - chunk * length), 0) * CG).to(tl.float32)[:, None]
        at = part_ptr + (image * num_chunks + chunk)[:, None] * (2 * G) + group[None, :]
        mean += tl.sum(count * tl.load(at, mask=(chunk < num_chunks)[:, None] & exists[None, :], other=0.0), 0)
    mean = mean / (pixels * CG)
    for first in range(0, num_chunks, _STEP):
        chunk = first + tl.arange(0, _STEP)
        count = (tl.maximum(tl.minimum(length, pixels - chunk * length), 0) * CG).to(tl.float32)[:, None]
        at = part_ptr + (image * num_chunks + chunk)[:, None] * (2 * G) + group[None, :]
        mask = (chunk < num_chunks)[:, None] & exists[None, :]
        distance = tl.load(at, mask=mask, other=0.0) - mean[None, :]
        squares += tl.sum(tl.load(at + G, mask=mask, other=0.0) + count * distance * distance, 0)
    return mean, 1.0 / tl.sqrt_rn(squares / (pixels * CG) + eps)


@triton.jit(do_not_specialize=_SIZES)
def _normalise(x_ptr, shift_ptr, shift_row, shift_bias_ptr, weight_ptr, bias_ptr, part_ptr, y_ptr, mean_ptr, rstd_ptr,
               pixels, length, num_chunks, eps, CG, G: tl.constexpr, TILE: tl.constexpr, CB: tl.constexpr,
               KP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr,
               SHIFT_BIAS: tl.constexpr):
    """Merges an image's moments and writes y; an image's first chunks also store mean and rstd [B, G]."""
    block, chunk, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C = G * CG
    group, exists = _tile_groups(block, G, CG, TILE, KP)
    mean, rstd = _merge_moments(part_ptr, image, pixels, length, num_chunks, group, exists, eps, CG, G, KP)
    if chunk == 0:
        tl.store(mean_ptr + image * G + group, mean, mask=exists)
        tl.store(rstd_ptr + image * G + group, rstd, mask=exists)
    lane_group, channel, inside = _lanes(block, C, CG, TILE, CB)
    shift = _shift(shift_ptr, shift_row, shift_bias_ptr, image, channel, inside, CB, SHIFT, SHIFT_BIAS)
    distance = shift - _to_channels(mean, lane_group, KP)
    scale = _to_channels(rstd, lane_group, KP) * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    x_ptr += image.to(tl.int64) * pixels * C
    y_ptr += image.to(tl.int64) * pixels * C
    first, end = chunk * length, tl.minimum((chunk + 1) * length, pixels)
    for row in tl.range(first, end, ROWS, num_stages=STAGES):
        offset, mask = _rows(row, end, channel, inside, C, ROWS)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        y = (x + distance[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image, channel, inside, CG, G: tl.constexpr):
    """A block's mean, rstd, weight and bias, [CB] each."""
    mean = tl.load(mean_ptr + image * G + channel // CG, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + image * G + channel // CG, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return mean, rstd, weight, tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gradients(x_ptr, dy_ptr, offset, mask, distance, rstd, weight, bias, SILU: tl.constexpr):
    """The normalised input and the gradient of the affine output, [ROWS, CB]; `distance` [CB] is shift - mean."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    normalised = tl.where(mask, (x + distance[None, :]) * rstd[None, :], 0.0)
    grad = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        y = normalised * weight[None, :] + bias[None, :]
        sigmoid = tl.sigmoid(y)
        grad = grad * sigmoid * (1.0 + y * (1.0 - sigmoid))
    return normalised, grad


@triton.jit(do_not_specialize=_SIZES)
def _backward_sums(dy_ptr, x_ptr, shift_ptr, shift_row, shift_bias_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
                   channel_part_ptr, group_part_ptr, pixels, length, num_chunks, CG, G: tl.constexpr,
                   TILE: tl.constexpr, CB: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
                   SILU: tl.constexpr, SHIFT: tl.constexpr, SHIFT_BIAS: tl.constexpr):
    """Of each chunk: sums over pixels of grad, grad x normalised, normalised -> channel_part [B, S, 3, C]; the first
    two, weighted, by group -> group_part [B, S, 2, G]."""
    block, chunk, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C = G * CG
    lane_group, channel, inside = _lanes(block, C, CG, TILE, CB)
    mean, rstd, weight, bias = _of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image, channel, inside, CG, G)
    distance = _shift(shift_ptr, shift_row, shift_bias_ptr, image, channel, inside, CB, SHIFT, SHIFT_BIAS) - mean
    x_ptr += image.to(tl.int64) * pixels * C
    dy_ptr += image.to(tl.int64) * pixels * C
    first, end = chunk * length, tl.minimum((chunk + 1) * length, pixels)
    grads = tl.zeros((ROWS, CB), tl.float32)
    products = tl.zeros((ROWS, CB), tl.float32)
    sums = tl.zeros((ROWS, CB), tl.float32)
    for row in tl.range(first, end, ROWS, num_stages=STAGES):
        offset, mask = _rows(row, end, channel, inside, C, ROWS)
        normalised, grad = _gradients(x_ptr, dy_ptr, offset, mask, distance, rstd, weight, bias, SILU)
        grads += grad
        products += grad * normalised
        if SHIFT or SHIFT_BIAS:
            sums += normalised
    grads_of_channels, products_of_channels = tl.sum(grads, 0), tl.sum(products, 0)
    at = channel_part_ptr + (image * num_chunks + chunk) * (3 * C) + channel
    tl.store(at, grads_of_channels, mask=inside)
    tl.store(at + C, products_of_channels, mask=inside)
    if SHIFT or SHIFT_BIAS:
        tl.store(at + 2 * C, tl.sum(sums, 0), mask=inside)
    group, exists = _tile_groups(block, G, CG, TILE, KP)
    at = group_part_ptr + (image * num_chunks + chunk) * (2 * G) + group
    tl.store(at, _to_groups(grads_of_channels * weight, lane_group, KP), mask=exists)
    tl.store(at + G, _to_groups(products_of_channels * weight, lane_group, KP), mask=exists)


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
def _backward(dy_ptr, x_ptr, residual_grad_ptr, shift_ptr, shift_row, shift_bias_ptr, mean_ptr, rstd_ptr, weight_ptr,
              bias_ptr, channel_part_ptr, group_part_ptr, dx_ptr, dweight_ptr, dbias_ptr, dshift_ptr, dshift_bias_ptr,
              images, pixels, length, num_chunks, num_blocks, num_reducers, CG, G: tl.constexpr, TILE: tl.constexpr,
              CB: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, SILU: tl.constexpr,
              RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, SHIFT_BIAS: tl.constexpr):
    """The first `num_reducers` programs reduce the parameters' gradients, each of the others writes a chunk of dx."""
    program = tl.program_id(0)
    C = G * CG
    if program < num_reducers:
        _parameter_grads(program, rstd_ptr, weight_ptr, channel_part_ptr, group_part_ptr, dweight_ptr, dbias_ptr,
                         dshift_ptr, dshift_bias_ptr, images, pixels, num_chunks, CG, G, SHIFT, SHIFT_BIAS)
    else:
        tile = program - num_reducers
        block = tile % num_blocks
        chunk = (tile // num_blocks) % num_chunks
        image = tile // (num_blocks * num_chunks)
        lane_group, channel, inside = _lanes(block, C, CG, TILE, CB)
        mean, rstd, weight, bias = _of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, image, channel, inside, CG,
                                                G)
        distance = _shift(shift_ptr, shift_row, shift_bias_ptr, image, channel, inside, CB, SHIFT, SHIFT_BIAS) - mean
        group, exists = _tile_groups(block, G, CG, TILE, KP)
        m1, m2 = _group_means(group_part_ptr, image, num_chunks, group, exists, pixels * CG, G, KP)
        m1, m2 = _to_channels(m1, lane_group, KP), _to_channels(m2, lane_group, KP)
        begin = image.to(tl.int64) * pixels * C
        first, end = chunk * length, tl.minimum((chunk + 1) * length, pixels)
        for row in tl.range(first, end, ROWS, num_stages=STAGES):
            offset, mask = _rows(row, end, channel, inside, C, ROWS)
            normalised, grad = _gradients(x_ptr + begin, dy_ptr + begin, offset, mask, distance, rstd, weight, bias,
                                          SILU)
            dx = rstd[None, :] * (grad * weight[None, :] - m1[None, :] - normalised * m2[None, :])
            if RESIDUAL:
                dx += tl.load(residual_grad_ptr + begin + offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + begin + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _tiling(images: int, channels: int, pixels: int, num_groups: int) -> tuple[dict, int, tuple[int, int]]:
    """Kernel constants, number of channel blocks, (length, number) of pixel chunks."""
    group_channels = channels // num_groups
    groups = max(1, min(128 // group_channels, num_groups))
    num_blocks = triton.cdiv(num_groups, groups)
    width = triton.next_power_of_2(groups * group_channels)
    rows = max(4, _TILE_ELEMENTS // width)
    constants = dict(
        CG=group_channels, G=num_groups, TILE=groups * group_channels, CB=width,
        KP=max(16, triton.next_power_of_2(groups)), ROWS=rows, STAGES=_STAGES, num_warps=4,
    )
    return constants, num_blocks, chunks(pixels, rows, triton.cdiv(_WANTED_PROGRAMS, images * num_blocks))


class GroupNorm(torch.autograd.Function):
    """x [B, C, H, W] channels_last, shift [B, C] with dense rows -> y; with `fork` also x, whose gradient is then
    added inside the kernel."""

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
        constants, num_blocks, (length, num_chunks) = _tiling(images, channels, height * width, num_groups)
        flags = dict(SHIFT=shift is not None, SHIFT_BIAS=shift_bias is not None)
        part = torch.empty(images, num_chunks, 2, num_groups, dtype=torch.float32, device=x.device)
        mean = torch.empty(images, num_groups, dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        shift_row = 0 if shift is None else shift.stride(0)  # it may be part of a wider matrix
        grid = (num_blocks, num_chunks, images)
        _moments[grid](x, shift, shift_row, shift_bias, part, height * width, length, num_chunks, **constants, **flags)
        _normalise[grid](
            x, shift, shift_row, shift_bias, weight, bias, part, y, mean, rstd, height * width, length, num_chunks,
            eps, SILU=silu, **constants, **flags,
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
        constants, num_blocks, (length, num_chunks) = _tiling(images, channels, height * width, ctx.num_groups)
        flags = dict(SILU=ctx.silu, SHIFT=shift is not None, SHIFT_BIAS=shift_bias is not None)
        channel_part = torch.empty(images, num_chunks, 3, channels, dtype=torch.float32, device=x.device)
        group_part = torch.empty(images, num_chunks, 2, ctx.num_groups, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        dshift = None if shift is None else shift.new_empty(shift.shape)
        dshift_bias = None if shift_bias is None else torch.empty_like(shift_bias)
        shift_row = 0 if shift is None else shift.stride(0)
        inputs = (shift, shift_row, shift_bias, mean, rstd, weight, bias, channel_part, group_part)
        _backward_sums[(num_blocks, num_chunks, images)](
            dy, x, *inputs, height * width, length, num_chunks, **constants, **flags
        )
        num_reducers = triton.cdiv(channels, REDUCED.value)
        _backward[(num_reducers + num_blocks * num_chunks * images,)](
            dy, x, residual_grad, *inputs, dx, dweight, dbias, dshift, dshift_bias, images, height * width, length,
            num_chunks, num_blocks, num_reducers, RESIDUAL=residual_grad is not None, **constants, **flags,
        )
        return dx, dweight, dbias, dshift, dshift_bias, None, None, None, None
