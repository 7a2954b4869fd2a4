"""AdamW and gradient norm over gradients that lie where autograd made them, found through a table of their addresses.

Gradients that already exist are added to: a read, an addition and a write a parameter, which a step with one backward
pass does not need. Gradients made anew have new addresses, but inside a CUDA graph the same ones in every replay.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from utils.kernels.adamw import apply_adamw, root_of_sum

BLOCK = 1024
_NORM_PROGRAMS = 2048  # fixed, so that the order of summation does not depend on the GPU
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class GradientTable:
    """Where the gradient of each block of a flat buffer lies.

    Args:
        numels: number of elements of each parameter, in the flat buffer's order.

    If every parameter starts at a multiple of 8 elements, as Stable Diffusion's do, the kernels read and write 16
    bytes at once; else single values, because a 16-byte access at an odd start is an error of the GPU.

    Full blocks come first, a parameter's incomplete last block among the others, so that only those need a mask.
    """

    def __init__(self, numels: list[int], device: torch.device | str):
        starts = [0, *itertools.accumulate(numels[:-1])]
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
        on_device = addresses.to(self.address.device, non_blocking=True)
        torch.add(on_device[self.parameter], self.offset, alpha=gradients[0].element_size(), out=self.address)

    def _launches(self) -> list[tuple[int, int, bool]]:
        """(first block, number of blocks, whether they need a mask) of each launch."""
        launches = [(0, self.num_full, False), (self.num_full, self.num_rest, True)]
        return [launch for launch in launches if launch[1]]

    def adamw_(
        self,
        weight: Tensor,
        remainder: Tensor | None,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        scalars: Tensor,
    ) -> None:
        """As kernels.updates.adamw_, with gradients in the weights' dtype."""
        tables = (self.address, self.start, self.count)
        constants = dict(IS_SPLIT=remainder is not None, GRAD_DTYPE=_DTYPES[weight.dtype], BLOCK=BLOCK, num_warps=4)
        for first, count, masked in self._launches():
            buffers = (weight, remainder, exp_avg, exp_avg_sq, scalars)
            _adamw_scattered[(count,)](*tables, *buffers, first, self.is_aligned, MASKED=masked, **constants)

    def grad_norm_(self, grad_dtype: torch.dtype, out: Tensor) -> None:
        """As kernels.updates.grad_norm_."""
        blocks = (self.num_full, self.num_full + self.num_rest)
        options = dict(GRAD_DTYPE=_DTYPES[grad_dtype], BLOCK=BLOCK, num_warps=4)
        _sums_of_squares_scattered[(_NORM_PROGRAMS,)](self.address, self.count, self.part, *blocks, **options)
        root_of_sum[(1,)](self.part, out, _NORM_PROGRAMS, BLOCK=_NORM_PROGRAMS)


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
        apply_adamw(grad, index, mask, weight_ptr, remainder_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, IS_SPLIT)


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
