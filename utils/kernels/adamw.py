"""Triton AdamW and gradient norm over flat buffers: memory-bound, deterministic, without a host sync."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from utils.kernels import rounding

_ADAMW_BLOCK = 1024
_NORM_PROGRAMS = 2048  # fixed, so that the order of summation does not depend on the GPU
_NORM_BLOCK = 4096
_STEP = tl.constexpr(rounding.STEP)
_FACTOR, _OTHER_FACTOR = tl.constexpr(rounding.FACTORS[0]), tl.constexpr(rounding.FACTORS[1])
_GRID, _GRIDS = tl.constexpr(rounding.GRID), tl.constexpr(1 / rounding.GRID)
_EXPONENT, _UNIT_BELOW = tl.constexpr(rounding.EXPONENT), tl.constexpr(rounding.UNIT_BELOW)
_WHOLE = tl.constexpr(2.0**23)  # from here on fp32 numbers have no fraction
_SMALLEST_EXPONENT = tl.constexpr(rounding.SMALLEST_EXPONENT)


@triton.jit
def adamw_update(grad, exp_avg, exp_avg_sq, master, scalars_ptr):
    """The new moments and masters, all fp32; scalars as in kernels.updates.adamw_."""
    beta1 = tl.load(scalars_ptr + 2)
    beta2 = tl.load(scalars_ptr + 3)
    lr = tl.load(scalars_ptr + 1)
    decay = 1.0 - lr * tl.load(scalars_ptr + 5)
    step_size = tl.div_rn(lr, tl.load(scalars_ptr + 6))
    grad = grad.to(tl.float32) * tl.load(scalars_ptr)
    exp_avg = beta1 * exp_avg + (1.0 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.load(scalars_ptr + 7)) + tl.load(scalars_ptr + 4)
    master = master * decay - tl.div_rn(step_size * exp_avg, denominator)
    return exp_avg, exp_avg_sq, master


@triton.jit
def _random_bits(index, number):
    """kernels.rounding.random_bits: 16 bits, uint32, for the parameters at `index` after `number` updates."""
    hashed = index.to(tl.uint32) ^ (number.to(tl.int32).to(tl.uint32) * _STEP)
    hashed = (hashed ^ (hashed >> 16)) * _FACTOR
    hashed = (hashed ^ (hashed >> 15)) * _OTHER_FACTOR
    return (hashed ^ (hashed >> 16)) & 0xFFFF


@triton.jit
def _unit_bits(weight):
    """The bits of kernels.rounding._unit(weight), uint32."""
    exponent = weight.to(tl.float32).to(tl.uint32, bitcast=True) & _EXPONENT
    return tl.maximum(exponent, _SMALLEST_EXPONENT) - _UNIT_BELOW


@triton.jit
def _join(weight, remainder, index, scalars_ptr):
    """kernels.rounding.join, before an update that is applied."""
    if weight.dtype == tl.bfloat16:
        lower = remainder.to(tl.uint16, bitcast=True).to(tl.uint32)
        carry = (lower + _random_bits(index, tl.load(scalars_ptr + 9) - 1.0)) >> 16
        upper = weight.to(tl.uint16, bitcast=True).to(tl.uint32) - carry
        return ((upper << 16) | lower).to(tl.float32, bitcast=True)
    else:
        unit = _unit_bits(weight).to(tl.float32, bitcast=True)
        return weight.to(tl.float32) + remainder.to(tl.float32) * unit


@triton.jit
def _split(master, index, scalars_ptr, DTYPE: tl.constexpr):
    """kernels.rounding.split_: the weights in DTYPE, and the remainders."""
    if DTYPE == tl.bfloat16:
        bits = master.to(tl.uint32, bitcast=True)
        rounded = bits + _random_bits(index, tl.load(scalars_ptr + 9))
        weight = ((rounded >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)
        return weight, (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        # To the nearest whole number of GRIDs, the even one of two, by an addition that leaves no room for a fraction.
        size = tl.abs(master) * _GRIDS
        size = tl.where(size < _WHOLE, (size + _WHOLE) - _WHOLE, size)
        master = tl.where((master < 0.0) & (size > 0.0), -size, size) * _GRID
        weight = master.to(DTYPE)
        one_over_unit = ((254 << 23) - _unit_bits(weight)).to(tl.float32, bitcast=True)
        return weight, ((master - weight.to(tl.float32)) * one_over_unit).to(tl.int16)


@triton.jit
def load_master(weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT: tl.constexpr):
    """The fp32 masters of the parameters at `index`."""
    master = tl.load(weight_ptr + index, mask=mask)
    if IS_SPLIT:
        master = _join(master, tl.load(remainder_ptr + index, mask=mask), index, scalars_ptr)
    return master


@triton.jit
def store_master(master, weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT: tl.constexpr):
    """Puts fp32 masters in place of those at `index`."""
    if IS_SPLIT:
        weight, remainder = _split(master, index, scalars_ptr, weight_ptr.dtype.element_ty)
        tl.store(weight_ptr + index, weight, mask=mask)
        tl.store(remainder_ptr + index, remainder, mask=mask)
    else:
        tl.store(weight_ptr + index, master, mask=mask)


@triton.jit
def apply_adamw(grad, index, mask, weight_ptr, remainder_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr,
                IS_SPLIT: tl.constexpr):
    """The update of the parameters at `index` of the flat buffers by `grad`."""
    exp_avg = tl.load(exp_avg_ptr + index, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + index, mask=mask)
    master = load_master(weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT)
    exp_avg, exp_avg_sq, master = adamw_update(grad, exp_avg, exp_avg_sq, master, scalars_ptr)
    tl.store(exp_avg_ptr + index, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + index, exp_avg_sq, mask=mask)
    store_master(master, weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT)


@triton.jit
def _adamw(weight_ptr, remainder_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, first, n,
           IS_SPLIT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """One block of parameters. Only the last is masked: a mask of unknown alignment would forbid vector loads."""
    index = (first + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n if MASKED else None
    if tl.load(scalars_ptr + 8) != 0.0:
        grad = tl.load(grad_ptr + index, mask=mask)
        apply_adamw(grad, index, mask, weight_ptr, remainder_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, IS_SPLIT)


@triton.jit
def _sums_of_squares(grad_ptr, part_ptr, n, num_blocks, BLOCK: tl.constexpr):
    """Each program sums every `num_programs`-th block; the first one also takes the incomplete block at the end."""
    program = tl.program_id(0)
    at = grad_ptr + program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(program, num_blocks, tl.num_programs(0)):
        grad = tl.load(at).to(tl.float32)
        total += grad * grad
        at += tl.num_programs(0) * BLOCK
    if program == 0:
        index = n // BLOCK * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        grad = tl.load(grad_ptr + index, mask=index < n, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(part_ptr + program, tl.sum(total, 0))


@triton.jit
def root_of_sum(part_ptr, out_ptr, num_parts, BLOCK: tl.constexpr):
    """out[0] = the square root of the sum of part [num_parts], at most BLOCK of them."""
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sqrt_rn(tl.sum(tl.load(part_ptr + index, mask=index < num_parts, other=0.0), 0)))


def adamw_(
    weight: Tensor, remainder: Tensor | None, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor
) -> None:
    """See kernels.updates.adamw_."""
    n = weight.numel()
    num_full = n // _ADAMW_BLOCK
    constants = dict(IS_SPLIT=remainder is not None, BLOCK=_ADAMW_BLOCK, num_warps=4)
    for first, count, masked in ((0, num_full, False), (num_full, int(n % _ADAMW_BLOCK != 0), True)):
        if count:
            _adamw[(count,)](
                weight, remainder, grad, exp_avg, exp_avg_sq, scalars, first, n, MASKED=masked, **constants
            )


@triton.jit
def _add_one(x_ptr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) + 1.0)


def add_one_(x: Tensor) -> None:
    """x [256] += 1; tells whether a kernel reaches x."""
    _add_one[(1,)](x, BLOCK=256)


def grad_norm_(grad: Tensor, out: Tensor) -> None:
    """See kernels.updates.grad_norm_."""
    num_blocks = grad.numel() // _NORM_BLOCK
    num_programs = max(1, min(_NORM_PROGRAMS, num_blocks))
    part = torch.empty(num_programs, dtype=torch.float32, device=grad.device)
    _sums_of_squares[(num_programs,)](grad, part, grad.numel(), num_blocks, BLOCK=_NORM_BLOCK, num_warps=8)
    root_of_sum[(1,)](part, out, num_programs, BLOCK=_NORM_PROGRAMS)
