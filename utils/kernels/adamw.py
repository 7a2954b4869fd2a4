"""Triton AdamW and gradient norm: memory-bound, deterministic, without a host sync.

Gradients lie where autograd made them, found through a table of their addresses. Those that already exist are added
to: a read, an addition and a write a parameter, which a step with one backward pass does not need. Gradients made anew
have new addresses, but inside a CUDA graph the same ones in every replay.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from utils.kernels import rounding

BLOCK = 1024
_NORM_PROGRAMS = 2048  # fixed, so that the order of summation does not depend on the GPU
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_STEP = tl.constexpr(rounding.STEP)
_FACTOR, _OTHER_FACTOR = tl.constexpr(rounding.FACTORS[0]), tl.constexpr(rounding.FACTORS[1])
_GRID, _GRIDS = tl.constexpr(rounding.GRID), tl.constexpr(1 / rounding.GRID)
_EXPONENT, _UNIT_BELOW = tl.constexpr(rounding.EXPONENT), tl.constexpr(rounding.UNIT_BELOW)
_WHOLE = tl.constexpr(2.0**23)  # from here on fp32 numbers have no fraction
_SMALLEST_EXPONENT = tl.constexpr(rounding.SMALLEST_EXPONENT)


@triton.jit
def adamw_update(grad, exp_avg, exp_avg_sq, master, scalars_ptr):
    """The new moments and masters, all fp32; scalars as in kernels.operations.adamw_."""
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
def _load_grad(address, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A full block of a gradient, by 16 bytes at once where they may be."""
    if address % 16 == 0:
        grad = tl.load(tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + tl.arange(0, BLOCK), 16))
    else:
        grad = tl.load(address.to(tl.pointer_type(DTYPE)) + tl.arange(0, BLOCK))
    return grad


@triton.jit
def _load_part(address, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The first `count` values of a block of a gradient, and zeros."""
    lane = tl.arange(0, BLOCK)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + lane, mask=lane < count, other=0.0)


@triton.jit
def _adamw_scattered(address_ptr, start_ptr, count_ptr, weight_ptr, remainder_ptr, exp_avg_ptr, exp_avg_sq_ptr,
                     scalars_ptr, first, ALIGNED: tl.constexpr, IS_SPLIT: tl.constexpr, GRAD_DTYPE: tl.constexpr,
                     MASKED: tl.constexpr, BLOCK: tl.constexpr):
    block = first + tl.program_id(0)
    if tl.load(scalars_ptr + 8) != 0.0:
        address = tl.load(address_ptr + block)
        start = tl.load(start_ptr + block)
        if MASKED:
            count = tl.load(count_ptr + block)
            mask = tl.arange(0, BLOCK) < count
            grad = _load_part(address, count, GRAD_DTYPE, BLOCK)
        else:
            mask = None
            grad = _load_grad(address, GRAD_DTYPE, BLOCK)
            if ALIGNED:
                start = tl.multiple_of(start, 8)
        index = start + tl.arange(0, BLOCK)
        exp_avg = tl.load(exp_avg_ptr + index, mask=mask)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + index, mask=mask)
        master = load_master(weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT)
        exp_avg, exp_avg_sq, master = adamw_update(grad, exp_avg, exp_avg_sq, master, scalars_ptr)
        tl.store(exp_avg_ptr + index, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + index, exp_avg_sq, mask=mask)
        store_master(master, weight_ptr, remainder_ptr, index, mask, scalars_ptr, IS_SPLIT)


@triton.jit
def _sums_of_squares_scattered(address_ptr, count_ptr, part_ptr, num_full, num_blocks, GRAD_DTYPE: tl.constexpr,
                               BLOCK: tl.constexpr):
    """Each program sums every `num_programs`-th full block, then of the others. Addresses are read one block ahead."""
    program, step = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros((BLOCK,), tl.float32)
    address = tl.load(address_ptr + program, mask=program < num_full, other=0)
    for block in range(program, num_full, step):
        grad = _load_grad(address, GRAD_DTYPE, BLOCK).to(tl.float32)
        address = tl.load(address_ptr + block + step, mask=block + step < num_full, other=0)
        total += grad * grad
    for block in range(num_full + program, num_blocks, step):
        grad = _load_part(tl.load(address_ptr + block), tl.load(count_ptr + block), GRAD_DTYPE, BLOCK).to(tl.float32)
        total += grad * grad
    tl.store(part_ptr + program, tl.sum(total, 0))


@triton.jit
def root_of_sum(part_ptr, out_ptr, num_parts, BLOCK: tl.constexpr):
    """out[0] = the square root of the sum of part [num_parts], at most BLOCK of them."""
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sqrt_rn(tl.sum(tl.load(part_ptr + index, mask=index < num_parts, other=0.0), 0)))


class GradientTable:
    """Where the gradient of each block of a flat buffer lies.

    Args:
        numels: number of elements of each parameter, in the flat buffer's order.
        dtype: the gradients'.

    If every parameter starts at a multiple of 8 elements, as Stable Diffusion's do, the kernels read and write 16
    bytes at once; else single values, because a 16-byte access at an odd start is an error of the GPU.

    Blocks are counted from each parameter's start. Full ones come first, a parameter's incomplete last block among the
    others, so that only those need a mask. For blocks of the flat buffer itself there are `bounds`, the index of each
    parameter's first element and of the end, `place`, the address of each gradient, and `parameter_at`, the number of
    the parameter at every BLOCK-th element.
    """

    def __init__(self, numels: list[int], dtype: torch.dtype, device: torch.device | str):
        bounds = torch.tensor([0, *itertools.accumulate(numels)])
        *starts, total = bounds.tolist()
        at = torch.searchsorted(bounds, torch.arange(0, total, BLOCK), right=True) - 1
        self.bounds, self.parameter_at = bounds.to(device), at.to(device, torch.int32)
        self.place = torch.zeros(len(numels), dtype=torch.int64, device=device)
        self.dtype = dtype
        self.is_aligned = all(start % 8 == 0 for start in starts)
        full = [(p, o) for p, n in enumerate(numels) for o in range(0, n - BLOCK + 1, BLOCK)]
        rest = [(p, n // BLOCK * BLOCK) for p, n in enumerate(numels) if n % BLOCK]
        parameter, offset = torch.tensor(full + rest, dtype=torch.int64).reshape(-1, 2).T.contiguous()
        self.num_full, self.num_rest = len(full), len(rest)
        self.parameter, self.offset = parameter.to(device), offset.to(device)
        # Of each block: where its gradient lies, and which elements of the flat buffer it is of.
        self.address = torch.zeros(len(parameter), dtype=torch.int64, device=device)
        self.start = (torch.tensor(starts)[parameter] + offset).to(device)
        self.count = (torch.tensor(numels)[parameter] - offset).clamp(max=BLOCK).to(device, torch.int32)
        self.part = torch.empty(_NORM_PROGRAMS, dtype=torch.float32, device=device)

    def set_addresses(self, gradients: list[torch.Tensor]) -> None:
        """Points the table at `gradients`, dense and in the parameters' layout; not part of a captured graph."""
        addresses = torch.tensor([gradient.data_ptr() for gradient in gradients])
        addresses = addresses.pin_memory() if self.address.is_cuda else addresses
        self.place.copy_(addresses, non_blocking=True)
        torch.add(self.place[self.parameter], self.offset, alpha=self.dtype.itemsize, out=self.address)

    def adamw_(
        self, weight: Tensor, remainder: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor
    ) -> None:
        """As kernels.operations.adamw_, 26 bytes a parameter.

        Remainder and moments may be in pinned host memory, where training.packed.host_memory_problem finds none.
        """
        table = (self.address, self.start, self.count)
        buffers = (weight, remainder, exp_avg, exp_avg_sq, scalars)
        constants = dict(IS_SPLIT=remainder is not None, GRAD_DTYPE=DTYPES[self.dtype], BLOCK=BLOCK, num_warps=4)
        for first, count, masked in ((0, self.num_full, False), (self.num_full, self.num_rest, True)):
            if count:
                _adamw_scattered[(count,)](*table, *buffers, first, self.is_aligned, MASKED=masked, **constants)

    def grad_norm_(self, out: Tensor) -> None:
        """As kernels.operations.grad_norm_."""
        blocks = (self.num_full, self.num_full + self.num_rest)
        options = dict(GRAD_DTYPE=DTYPES[self.dtype], BLOCK=BLOCK, num_warps=4)
        _sums_of_squares_scattered[(_NORM_PROGRAMS,)](self.address, self.count, self.part, *blocks, **options)
        root_of_sum[(1,)](self.part, out, _NORM_PROGRAMS, BLOCK=_NORM_PROGRAMS)


@triton.jit
def _add_one(x_ptr, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) + 1.0)


def add_one_(x: Tensor) -> None:
    """x [256] += 1; tells whether a kernel reaches x."""
    _add_one[(1,)](x, BLOCK=256)
