"""Triton AdamW on moments in 8 bits (utils/training/packed.py): read, updated and quantised again in one kernel.

It moves half as many bytes as kernels.adamw's update, so arithmetic counts: quotients and roots are the GPU's own, to
2 units in the last place.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from utils.kernels import adamw
from utils.kernels.adamw import DTYPES, GradientTable, load_master, store_master

BLOCK = 256  # packed.BLOCK
_ROWS = adamw.BLOCK // BLOCK  # blocks a program: the table has the parameter at the first value of each program's
_SMALLEST_SIGNED = tl.constexpr(2.0**-100)
_SMALLEST_SQUARED = tl.constexpr(2.0**-45)
_MORE = tl.constexpr(1 + 2.0**-21)  # than the square: what is between two levels goes up, however it was rounded
_TO_WHOLE = tl.constexpr(1.5 * 2.0**23)  # added to a small number it leaves the nearest whole one in the lowest bits


@triton.jit
def _gradient(bound_ptr, place_ptr, parameter, start, end, place, first, lane, n, DTYPE: tl.constexpr,
              SIZE: tl.constexpr):
    """The flat gradient from `first` on, SIZE elements, of `parameter` and of those behind it; zeros from `n` on."""
    if end >= first + SIZE:
        address = place + (first - start) * (DTYPE.primitive_bitwidth // 8)
        if address % 16 == 0:
            grad = tl.load(tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + lane, [16, 16]))
        else:
            grad = tl.load(address.to(tl.pointer_type(DTYPE)) + lane)
    else:
        grad = tl.zeros_like(lane).to(DTYPE)
        while start < tl.minimum(first + SIZE, n):
            end = tl.load(bound_ptr + parameter + 1)
            own = (first + lane >= start) & (first + lane < end)
            own_ptr = tl.load(place_ptr + parameter).to(tl.pointer_type(DTYPE)) + (first + lane - start)
            grad = tl.where(own, tl.load(own_ptr, mask=own, other=0.0), grad)
            parameter += 1
            start = end
    return grad


@triton.jit
def _values(levels, scales, MOST: tl.constexpr):
    levels = levels.to(tl.int32).to(tl.float32)
    return levels * tl.abs(levels) * (scales * (1.0 / (MOST * MOST)))[:, None]


@triton.jit
def _levels(sizes, smallest, MOST: tl.constexpr):
    """Of the sizes of values [ROWS, BLOCK] the levels, as floats before rounding, and the scales [ROWS]."""
    scales = tl.max(sizes, 1)
    scales = tl.where(scales < smallest, 0.0, scales)
    factors = MOST * MOST * _MORE / tl.where(scales == 0.0, float("inf"), scales)
    return tl.sqrt(sizes * factors[:, None]), scales


@triton.jit
def _update(grad, exp_avg, root, master, scalars_ptr):
    """As kernels.adamw.adamw_update, with the second moment's root in its place, before and after."""
    beta1 = tl.load(scalars_ptr + 2)
    beta2 = tl.load(scalars_ptr + 3)
    lr = tl.load(scalars_ptr + 1)
    grad = grad.to(tl.float32) * tl.load(scalars_ptr)
    exp_avg = beta1 * exp_avg + (1.0 - beta1) * grad
    root = tl.sqrt(beta2 * (root * root) + (1.0 - beta2) * grad * grad)
    denominator = root * (1.0 / tl.load(scalars_ptr + 7)) + tl.load(scalars_ptr + 4)
    step_size = lr / tl.load(scalars_ptr + 6)
    master = master * (1.0 - lr * tl.load(scalars_ptr + 5)) - step_size * exp_avg / denominator
    return exp_avg, root, master


@triton.jit
def _whole(levels):
    return (levels + _TO_WHOLE).to(tl.int32, bitcast=True)


@triton.jit
def _adamw_8bit(bound_ptr, place_ptr, parameter_ptr, weight_ptr, remainder_ptr, exp_avg_ptr, scales_ptr,
                exp_avg_sq_ptr, scales_sq_ptr, scalars_ptr, first, n, IS_SPLIT: tl.constexpr,
                GRAD_DTYPE: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS blocks of parameters; only the last program is masked."""
    program = first + tl.program_id(0)
    parameter = tl.load(parameter_ptr + program)
    start = tl.load(bound_ptr + parameter)
    end = tl.load(bound_ptr + parameter + 1)
    place = tl.load(place_ptr + parameter)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    first_index = program.to(tl.int64) * (ROWS * BLOCK)
    index = first_index + lane
    if tl.load(scalars_ptr + 8) != 0.0:
        if MASKED:
            mask = index < n
            row_mask = row * BLOCK < n
            levels = tl.load(exp_avg_ptr + index, mask=mask, other=0)
            levels_sq = tl.load(exp_avg_sq_ptr + index, mask=mask, other=0)
            scales = tl.load(scales_ptr + row, mask=row_mask, other=0.0)
            scales_sq = tl.load(scales_sq_ptr + row, mask=row_mask, other=0.0)
        else:
            mask = None
            row_mask = None
            levels = tl.load(exp_avg_ptr + index)
            levels_sq = tl.load(exp_avg_sq_ptr + index)
            scales = tl.load(scales_ptr + row)
            scales_sq = tl.load(scales_sq_ptr + row)
        master = load_master(weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT)
        grad = _gradient(bound_ptr, place_ptr, parameter, start, end, place, first_index, lane, n, GRAD_DTYPE,
                         ROWS * BLOCK)

        exp_avg = _values(levels, scales, 127)
        root = _values(levels_sq, scales_sq, 255)
        exp_avg, root, master = _update(grad, exp_avg, root, master, scalars_ptr)
        store_master(master, weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT)

        levels, scales = _levels(tl.abs(exp_avg), _SMALLEST_SIGNED, 127)
        levels_sq, scales_sq = _levels(root, _SMALLEST_SQUARED, 255)
        levels = tl.where(exp_avg < 0.0, -levels, levels)
        levels_sq = tl.where((root > 0.0) & (scales_sq > 0.0)[:, None], tl.maximum(levels_sq, 1.0), levels_sq)
        tl.store(exp_avg_ptr + index, _whole(levels).to(tl.int8), mask=mask)
        tl.store(exp_avg_sq_ptr + index, _whole(levels_sq).to(tl.uint8), mask=mask)
        tl.store(scales_ptr + row, scales, mask=row_mask)
        tl.store(scales_sq_ptr + row, scales_sq, mask=row_mask)


def adamw_8bit_(
    weight: Tensor, remainder: Tensor | None, gradients: GradientTable, exp_avg: Any, exp_avg_sq: Any, scalars: Tensor
) -> None:
    """See kernels.operations.adamw_8bit_."""
    n = weight.numel()
    num_full = n // (_ROWS * BLOCK)
    table = (gradients.bounds, gradients.place, gradients.parameter_at)
    moments = (exp_avg.levels, exp_avg.scales, exp_avg_sq.levels, exp_avg_sq.scales)
    buffers = (weight, remainder, *moments, scalars)
    constants = dict(IS_SPLIT=remainder is not None, GRAD_DTYPE=DTYPES[gradients.dtype], ROWS=_ROWS, BLOCK=BLOCK)
    for first, count, masked in ((0, num_full, False), (num_full, int(n % (_ROWS * BLOCK) != 0), True)):
        if count:
            _adamw_8bit[(count,)](*table, *buffers, first, n, MASKED=masked, num_warps=4, **constants)
