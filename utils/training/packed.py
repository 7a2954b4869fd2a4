"""Float32 values that are kept in fewer bytes: read into a tensor, or taken from one, a piece at a time."""

from abc import ABC, abstractmethod

import torch

_PIECE = 1 << 22  # values at a time: what is unpacked for a copy needs little memory


class Packed(ABC):
    """Float32 values [numel] in another form; what is packed and unpacked again has the same bits.

    Slices may have to start at multiples of what a subclass says.
    """

    numel: int

    @abstractmethod
    def __getitem__(self, piece: slice) -> "Packed":
        """A part of the values, in the same memory; `piece` has a start and a stop."""

    @abstractmethod
    def unpack(self, device: torch.device | None = None) -> torch.Tensor:
        """The values, float32 [numel], computed where they are or on another device."""

    @abstractmethod
    def pack_(self, values: torch.Tensor) -> None:
        """Takes `values` [numel], which may be on another device: the other form is computed there."""

    def pieces(self) -> list[slice]:
        """Slices that cover all values, each small enough to be unpacked beside everything else."""
        return [slice(start, min(start + _PIECE, self.numel)) for start in range(0, self.numel, _PIECE)]

    def read_into(self, values: torch.Tensor, device: torch.device) -> None:
        """Unpacks into `values` [numel], which may be in host memory; computes on `device`, and may not wait."""
        for piece in self.pieces():
            values[piece].copy_(self[piece].unpack(device), non_blocking=True)

    def write_from(self, values: torch.Tensor, device: torch.device) -> None:
        """Packs `values` [numel], wherever they are; computes on `device`."""
        for piece in self.pieces():
            self[piece].pack_(values[piece].to(device))
