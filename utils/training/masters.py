"""The float32 masters of a network's weights, in the memory of the weights and 16 bits more each."""

import torch
from torch import Tensor

from utils.kernels.rounding import join, split_
from utils.training.packed import Packed


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
        """See Packed.pack_."""
        if self.remainder is None:
            self.weight.copy_(values)
        else:
            split_(self.weight, self.remainder, values, self.num_updates, self.first)
