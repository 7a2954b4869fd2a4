"""fp32 masters rounded to the weights that the network computes with: the definition, in plain torch.

fp16: the nearest. bf16: one of the two neighbours, the nearer the likelier (stochastic rounding: Gupta et al. 2015,
arXiv 1502.02551), anew at every update. bf16 numbers near w are w/128 apart: the nearest of them would not move
for many updates of 1e-6, and the gradient would be that of the weights before training (docs/precision.md). Which
neighbour it is follows from the number of updates and the parameter's place: a resumed run has the same weights.
"""

import torch
from torch import Tensor

STEP = 0x9E3779B1  # 2**32 over the golden ratio: numbers in a row lie far apart
FACTORS = 0x7FEB352D, 0x846CA68B  # an integer hash of low bias (Wellons 2018, github.com/skeeto/hash-prospector)
_CHUNK = 1 << 22  # elements at a time


def _signed(constant: int) -> int:
    """The int32 of the same 32 bits."""
    return constant - (1 << 32) if constant >> 31 else constant


def random_bits(first: int, count: int, number: Tensor | int, device: torch.device | str) -> Tensor:
    """16 bits, int32 [count], for the parameters from `first` on after `number` updates (an int32 scalar, or an int).

    Products of int32 wrap around, and shifts of them are arithmetic: hence the masks.
    """
    hashed = torch.arange(first, first + count, device=device).to(torch.int32)
    hashed ^= torch.as_tensor(number, dtype=torch.int32, device=device) * _signed(STEP)
    hashed ^= (hashed >> 16) & 0xFFFF
    hashed *= _signed(FACTORS[0])
    hashed ^= (hashed >> 15) & 0x1FFFF
    hashed *= _signed(FACTORS[1])
    hashed ^= (hashed >> 16) & 0xFFFF
    return hashed & 0xFFFF


@torch.no_grad()
def round_(weight: Tensor, master: Tensor, number: Tensor | int, first: int = 0) -> None:
    """weight [N], fp16 or bf16, becomes the rounded master [N], fp32, after `number` updates.

    Args:
        first: where the two begin in the flat buffer of all parameters.
    """
    if weight.dtype != torch.bfloat16:
        weight.copy_(master)
        return
    for start in range(0, weight.numel(), _CHUNK):
        piece = master[start : start + _CHUNK].to(weight.device)
        bits = piece.view(torch.int32) + random_bits(first + start, piece.numel(), number, weight.device)
        weight[start : start + _CHUNK] = (bits & -65536).view(torch.float32)
