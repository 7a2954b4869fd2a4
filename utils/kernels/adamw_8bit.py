"""Triton AdamW on moments in 8 bits (utils/training/packed.py): read, updated and quantised again in one kernel."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from utils.kernels.adamw import adamw_update, load_master, store_master

BLOCK = 256  # packed.BLOCK
_ROWS = 4  # blocks a program
_SMALLEST_SIGNED = tl.constexpr(2.0**-100)
_SMALLEST_SQUARED = tl.constexpr(2.0**-45)


@triton.jit
def _values(levels, scales, MOST: tl.constexpr):
    levels = levels.to(tl.float32)
    return tl.div_rn(levels * tl.abs(levels), MOST * MOST * 1.0) * scales[:, None]


@triton.jit
def _levels(sizes, smallest, MOST: tl.constexpr):
    """The levels of the sizes of values [ROWS, BLOCK], and the scales [ROWS]."""
    scales = tl.max(sizes, 1)
    scales = tl.where(scales < smallest, 0.0, scales)
    divisors = tl.where(scales == 0.0, 1.0, scales)
    return tl.floor(tl.sqrt_rn(tl.div_rn(sizes, divisors[:, None])) * MOST + 0.5), scales


@triton.jit
def _adamw_8bit(weight_ptr, remainder_ptr, grad_ptr, exp_avg_ptr, scales_ptr, exp_avg_sq_ptr, scales_sq_ptr,
                scalars_ptr, first, n, IS_SPLIT: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):
    """ROWS blocks of parameters; only the last program is masked."""
    row = (first + tl.program_id(0)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if tl.load(scalars_ptr + 8) != 0.0:
        if MASKED:
            mask = index < n
            row_mask = row * BLOCK < n
            grad = tl.load(grad_ptr + index, mask=mask, other=0.0)
            levels = tl.load(exp_avg_ptr + index, mask=mask, other=0)
            levels_sq = tl.load(exp_avg_sq_ptr + index, mask=mask, other=0)
            scales = tl.load(scales_ptr + row, mask=row_mask, other=0.0)
            scales_sq = tl.load(scales_sq_ptr + row, mask=row_mask, other=0.0)
        else:
            mask = None
            row_mask = None
            grad = tl.load(grad_ptr + index)
            levels = tl.load(exp_avg_ptr + index)
            levels_sq = tl.load(exp_avg_sq_ptr + index)
            scales = tl.load(scales_ptr + row)
            scales_sq = tl.load(scales_sq_ptr + row)
        master = load_master(weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT)
        root = _values(levels_sq, scales_sq, 255)
        exp_avg = _values(levels, scales, 127)
        exp_avg, exp_avg_sq, master = adamw_update(grad, exp_avg, root * root, master, scalars_ptr)
        store_master(master, weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT)
        levels, scales = _levels(tl.abs(exp_avg), _SMALLEST_SIGNED, 127)
        levels = tl.where(exp_avg < 0.0, -levels, levels)
        root = tl.sqrt_rn(exp_avg_sq)
        levels_sq, scales_sq = _levels(root, _SMALLEST_SQUARED, 255)
        levels_sq = tl.where((root > 0.0) & (scales_sq > 0.0)[:, None], tl.maximum(levels_sq, 1.0), levels_sq)
        tl.store(exp_avg_ptr + index, levels.to(tl.int8), mask=mask)
        tl.store(exp_avg_sq_ptr + index, levels_sq.to(tl.uint8), mask=mask)
        tl.store(scales_ptr + row, scales, mask=row_mask)
        tl.store(scales_sq_ptr + row, scales_sq, mask=row_mask)


def adamw_8bit_(
    weight: Tensor, remainder: Tensor | None, grad: Tensor, exp_avg: Any, exp_avg_sq: Any, scalars: Tensor
) -> None:
    """See kernels.operations.adamw_8bit_."""
    n = weight.numel()
    num_full = n // (_ROWS * BLOCK)
    constants = dict(IS_SPLIT=remainder is not None, ROWS=_ROWS, BLOCK=BLOCK, num_warps=4)
    moments = (exp_avg.levels, exp_avg.scales, exp_avg_sq.levels, exp_avg_sq.scales)
    for first, count, masked in ((0, num_full, False), (num_full, int(n % (_ROWS * BLOCK) != 0), True)):
        if count:
            _adamw_8bit[(count,)](weight, remainder, grad, *moments, scalars, first, n, MASKED=masked, **constants)
