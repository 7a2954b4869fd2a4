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
        parameters, offsets = torch.tensor(full + rest, dtype=torch.int64).reshape(-1, 2).T.contiguous()
        self.num_full, self.num_rest = len(full), len(rest)
        self.parameter = parameters.to(device, torch.int32)
        self.offset = offsets.to(device)
        self.start = torch.tensor(starts, device=device)
        self.numel = torch.tensor(numels, device=device)
        self.address = torch.zeros(len(numels), dtype=torch.int64, device=device)
        self.part = torch.empty(_NORM_PROGRAMS, dtype=torch.float32, device=device)

    def set_addresses(self, gradients: list[torch.Tensor]) -> None:
        """Points the table at `gradients`, dense and in the parameters' layout; not part of a captured graph."""
        addresses = torch.tensor([gradient.data_ptr() for gradient in gradients])
        self.address.copy_(addresses.pin_memory() if self.address.is_cuda else addresses, non_blocking=True)

    def _launches(self) -> list[tuple[int, int, bool]]:
        """(first block, number of blocks, whether they need a mask) of each launch."""
        launches = [(0, self.num_full, False), (self.num_full, self.num_rest, True)]
        return [launch for launch in launches if launch[1]]

    def adamw_(
        self,
        weight: Tensor | None,
        grad_dtype: torch.dtype,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        scalars: Tensor,
    ) -> None:
        """As kernels.adamw_."""
        tables = (self.parameter, self.offset, self.address, self.start, self.numel)
        constants = dict(HAS_WEIGHT=weight is not None, GRAD_DTYPE=_DTYPES[grad_dtype], BLOCK=BLOCK, num_warps=4)
        for first, count, masked in self._launches():
            buffers = (weight, master, exp_avg, exp_avg_sq, scalars)
            _adamw_scattered[(count,)](*tables, *buffers, first, self.is_aligned, MASKED=masked, **constants)

    def grad_norm_(self, grad_dtype: torch.dtype, out: Tensor) -> None:
        """As kernels.grad_norm_."""
        tables = (self.parameter, self.offset, self.address, self.numel)
        num_blocks = self.num_full + self.num_rest
        options = dict(GRAD_DTYPE=_DTYPES[grad_dtype], BLOCK=BLOCK, num_warps=4)
        _sums_of_squares_scattered[(_NORM_PROGRAMS,)](*tables, self.part, num_blocks, **options)
        root_of_sum[(1,)](self.part, out, _NORM_PROGRAMS, BLOCK=_NORM_PROGRAMS)


@triton.jit
def _adamw_scattered(parameter_ptr, offset_ptr, address_ptr, start_ptr, numel_ptr, weight_ptr, master_ptr, exp_avg_ptr,
                     exp_avg_sq_ptr, scalars_ptr, first, ALIGNED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                     GRAD_DTYPE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    block = first + tl.program_id(0)
    if tl.load(scalars_ptr + 8) != 0.0:
        parameter = tl.load(parameter_ptr + block)
        offset = tl.load(offset_ptr + block)
        start = tl.load(start_ptr + parameter) + offset
        address = tl.load(address_ptr + parameter)
        lane = tl.arange(0, BLOCK)
        if MASKED:
            mask = offset + lane < tl.load(numel_ptr + parameter)
        else:
            mask = None
            if ALIGNED:
                start = tl.multiple_of(start, 8)
            offset = tl.multiple_of(offset, 8)
        grad = tl.load(address.to(tl.pointer_type(GRAD_DTYPE)) + offset + lane, mask=mask)
        index = start + lane
        apply_adamw(grad, index, mask, weight_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, HAS_WEIGHT)


@triton.jit
def _sums_of_squares_scattered(parameter_ptr, offset_ptr, address_ptr, numel_ptr, part_ptr, num_blocks,
                               GRAD_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Each program sums every `num_programs`-th block."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        parameter = tl.load(parameter_ptr + block)
        offset = tl.multiple_of(tl.load(offset_ptr + block), 8)
        left = tl.load(numel_ptr + parameter) - offset
        at = tl.load(address_ptr + parameter).to(tl.pointer_type(GRAD_DTYPE)) + offset + lane
        if left >= BLOCK:
            grad = tl.load(at)
        else:
            grad = tl.load(at, mask=lane < left, other=0.0)
        grad = grad.to(tl.float32)
        total += grad * grad
    tl.store(part_ptr + tl.program_id(0), tl.sum(total, 0))
