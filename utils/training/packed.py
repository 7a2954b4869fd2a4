"""Float32 values that are kept in fewer bytes: masters, and moments in 8 bits. A piece at a time is read or taken.

And where they are kept: on the GPU, or in buffers in the host's memory that it reads and writes by itself, over PCIe.
"""

import contextlib
import mmap
import weakref
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.kernels.operations import HAS_TRITON
from utils.kernels.rounding import join, split_
from utils.runtime import private

if HAS_TRITON:
    from utils.kernels.adamw import add_one_

_PIECE = 1 << 22  # values at a time: what is unpacked for a copy needs little memory
BLOCK = 256
_MOST = {torch.int8: 127, torch.uint8: 255}
_SMALLEST = {torch.int8: 2.0**-100, torch.uint8: 2.0**-45}
_PORTABLE_AND_MAPPED = 3  # cudaHostRegister's flags


class Packed(ABC):
    """Float32 values [numel] in another form; what is packed and unpacked again has the same bits.

    Slices may have to start at multiples of what a subclass says.
    """

    numel: int

    @abstractmethod
    def __getitem__(self, piece: slice) -> "Packed":
        """A part of the values, in the same memory; `piece` has a start and a stop."""

    @abstractmethod
    def unpack(self, device: torch.device | None = None) -> Tensor:
        """The values, float32 [numel], computed where they are or on another device."""

    @abstractmethod
    def pack_(self, values: Tensor) -> None:
        """Takes `values` [numel], which may be on another device: the other form is computed there."""

    def pieces(self) -> list[slice]:
        """Slices that cover all values, each small enough to be unpacked beside everything else."""
        return [slice(start, min(start + _PIECE, self.numel)) for start in range(0, self.numel, _PIECE)]

    def read_into(self, values: Tensor, device: torch.device) -> None:
        """Unpacks into `values` [numel], which may be in host memory; computes on `device`, and may not wait."""
        for piece in self.pieces():
            values[piece].copy_(self[piece].unpack(device), non_blocking=True)

    def write_from(self, values: Tensor, device: torch.device) -> None:
        """Packs `values` [numel], wherever they are; computes on `device`."""
        for piece in self.pieces():
            self[piece].pack_(values[piece].to(device))


class Masters(Packed):
    """Float32 values [numel] as kernels.rounding splits them.

    Args:
        weight: what the network computes with, float16 or bfloat16 [numel]; or float32, and the masters themselves.
        remainder: int16 [numel], on the weights' device or in pinned host memory; None for float32.
        num_updates: int64 scalar on the weights' device, how many updates there were: bfloat16 is rounded by it.
        first: where the buffers begin in the flat buffer of all parameters.
    """

    def __init__(self, weight: Tensor, remainder: Tensor | None, num_updates: Tensor, first: int = 0):
        self.weight, self.remainder, self.num_updates, self.first = weight, remainder, num_updates, first
        self.numel = weight.numel()

    def __getitem__(self, piece: slice) -> "Masters":
        remainder = None if self.remainder is None else self.remainder[piece]
        return Masters(self.weight[piece], remainder, self.num_updates, self.first + piece.start)

    def unpack(self, device: torch.device | None = None) -> Tensor:
        """See Packed.unpack; the weights themselves if they are float32."""
        weight = self.weight.to(device=device, non_blocking=True)
        if self.remainder is None:
            return weight
        return join(weight, self.remainder.to(weight.device, non_blocking=True), self.num_updates, self.first)

    def pack_(self, values: Tensor) -> None:
        if self.remainder is None:
            self.weight.copy_(values)
        else:
            split_(self.weight, self.remainder, values, self.num_updates, self.first)


class EightBit(Packed):
    """AdamW's moments in 8 bits: blocks of 256 values share a float32 scale, and levels are spaced as squares.

    A value is (level / most)**2 times the largest of its block, so small values are kept finer than large ones, and
    the largest is kept exactly. The first moment has levels -127 to 127. Of the second the square root is kept, in
    levels 0 to 255; only a true zero has level 0, because the update divides by it.

    Quantising what was dequantised gives the same bits: a checkpoint holds float32 values, and a resumed run continues
    exactly. What is too small for that to hold in float32 (below `_SMALLEST`, while AdamW's epsilon is 1e-8) becomes
    zero.

    Slices start at multiples of BLOCK.

    Args:
        levels: int8 (values of either sign) or uint8 (square roots of values that are not negative), of whole blocks.
        scales: float32, one a block.
        numel: how many values, without the filling of the last block.
    """

    def __init__(self, levels: Tensor, scales: Tensor, numel: int):
        self.levels, self.scales, self.numel = levels, scales, numel

    @classmethod
    def zeros(cls, numel: int, *, signed: bool, device: torch.device, on_host: bool) -> "EightBit":
        """All zero, on `device` or in pinned host memory."""
        num_blocks = -(-numel // BLOCK)
        dtype = torch.int8 if signed else torch.uint8
        levels = zero_buffer(num_blocks * BLOCK, dtype, device, on_host)
        return cls(levels, zero_buffer(num_blocks, torch.float32, device, on_host), numel)

    def __getitem__(self, piece: slice) -> "EightBit":
        blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
        levels = self.levels[blocks.start * BLOCK : blocks.stop * BLOCK]
        return EightBit(levels, self.scales[blocks], piece.stop - piece.start)

    def unpack(self, device: torch.device | None = None) -> Tensor:
        levels, scales = (part.to(device=device, non_blocking=True) for part in (self.levels, self.scales))
        levels, most = levels.float().view(-1, BLOCK), _MOST[self.levels.dtype]
        values = levels * levels.abs() / most**2 * scales[:, None]
        values = values if self.levels.dtype == torch.int8 else values.square()
        return values.view(-1)[: self.numel]

    def pack_(self, values: Tensor) -> None:
        values = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        signed, most = self.levels.dtype == torch.int8, _MOST[self.levels.dtype]
        sizes = values.abs() if signed else values.sqrt()
        scales = sizes.amax(1, keepdim=True)
        scales = torch.where(scales < _SMALLEST[self.levels.dtype], 0, scales)
        levels = sizes.div(torch.where(scales == 0, 1, scales)).sqrt_().mul_(most).add_(0.5).floor_()
        if signed:
            levels = levels.copysign_(values)
        else:
            levels = torch.where((sizes > 0) & (scales > 0), levels.clamp(min=1), levels)
        self.levels.copy_(levels.view(-1))
        self.scales.copy_(scales.view(-1))


def zero_buffer(numel: int, dtype: torch.dtype, device: torch.device, on_host: bool) -> torch.Tensor:
    """Zeros [numel] on `device`, or in pinned host memory where `on_host` and the device is a GPU."""
    if on_host and device.type == "cuda":
        return pinned_zeros(numel, dtype, device)
    return torch.zeros(numel, dtype=dtype, device=device)


def pinned_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros [numel] in pinned memory of just that size: torch's own pinned memory comes in powers of two."""
    num_bytes = max(numel, 1) * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(pages, dtype=dtype, count=max(numel, 1))
    cudart = torch.cuda.cudart()
    with torch.cuda.device(device):
        failed = int(getattr(cudart, private.HOST_REGISTER)(buffer.data_ptr(), num_bytes, _PORTABLE_AND_MAPPED))
    if failed:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # the next operation would be blamed for the error
        return torch.zeros(numel, dtype=dtype, pin_memory=True)
    weakref.finalize(pages, getattr(cudart, private.HOST_UNREGISTER), buffer.data_ptr()).atexit = False
    return buffer[:numel]


def host_memory_problem(device: torch.device) -> str | None:
    """Why kernels on this GPU cannot reach the host's memory, a clause about Triton; None if they did when tried."""
    if not HAS_TRITON:
        return "which is not here"
    x = pinned_zeros(256, torch.float32, device)
    with contextlib.suppress(RuntimeError, ValueError), torch.cuda.device(device):
        add_one_(x)
        torch.cuda.synchronize(device)
        if (x == 1).all():
            return None
    return "which cannot reach the host's memory here"
