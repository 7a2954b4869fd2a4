"""AdamW's moments in 8 bits: blocks of 256 values share a float32 scale, and levels are spaced as squares.

A value is (level / most)**2 times the largest of its block, so small values are kept finer than large ones, and the
largest is kept exactly. The first moment has levels -127 to 127. Of the second the square root is kept, in levels 0 to
255; only a true zero has level 0, because the update divides by it.

Quantising what was dequantised gives the same bits: a checkpoint holds float32 values, and a resumed run continues
exactly. What is too small for that to hold in float32 (below `_SMALLEST`, while AdamW's epsilon is 1e-8) becomes zero.
"""

import torch
import torch.nn.functional as F

from utils.training import host_memory
from utils.training.packed import Packed

BLOCK = 256
_MOST = {torch.int8: 127, torch.uint8: 255}
_SMALLEST = {torch.int8: 2.0**-100, torch.uint8: 2.0**-45}


class EightBit(Packed):
    """Float32 values [numel] in 8 bits each, and `scales` [numel / 256]. Slices start at multiples of BLOCK.

    Args:
        levels: int8 (values of either sign) or uint8 (square roots of values that are not negative), of whole blocks.
        scales: float32, one a block.
        numel: how many values, without the filling of the last block.
    """

    def __init__(self, levels: torch.Tensor, scales: torch.Tensor, numel: int):
        self.levels, self.scales, self.numel = levels, scales, numel

    @classmethod
    def zeros(cls, numel: int, *, signed: bool, device: torch.device, on_host: bool) -> "EightBit":
        """All zero, on `device` or in pinned host memory."""
        num_blocks = -(-numel // BLOCK)
        dtype = torch.int8 if signed else torch.uint8
        levels = host_memory.zeros(num_blocks * BLOCK, dtype, device, on_host)
        return cls(levels, host_memory.zeros(num_blocks, torch.float32, device, on_host), numel)

    def __getitem__(self, piece: slice) -> "EightBit":
        blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
        levels = self.levels[blocks.start * BLOCK : blocks.stop * BLOCK]
        return EightBit(levels, self.scales[blocks], piece.stop - piece.start)

    def unpack(self, device: torch.device | None = None) -> torch.Tensor:
        """See Packed.unpack."""
        levels, scales = (part.to(device=device, non_blocking=True) for part in (self.levels, self.scales))
        levels, most = levels.float().view(-1, BLOCK), _MOST[self.levels.dtype]
        values = levels * levels.abs() / most**2 * scales[:, None]
        values = values if self.levels.dtype == torch.int8 else values.square()
        return values.view(-1)[: self.numel]

    def pack_(self, values: torch.Tensor) -> None:
        """See Packed.pack_."""
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
