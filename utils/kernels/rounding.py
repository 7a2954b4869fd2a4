"""fp32 masters as two 16-bit numbers: the weights that the network computes with, and what their rounding left over.

This is the definition, in plain torch. The pair takes 4 bytes a parameter where master and weight took 6.

fp16: the weight is the nearest fp16 number, and the remainder, int16, is how far the master is from it, in 2**-14ths
of half the spacing of fp16 numbers there. For that masters are multiples of 2**-39. Those of 2**-16 and more in size
are already, because fp32 numbers there are as far apart; smaller ones move by at most 2**-40, a millionth of an update
at a learning rate of 1e-6.

bf16: the weight is one of the two neighbours, the nearer the likelier (stochastic rounding: Gupta et al. 2015,
arXiv 1502.02551), anew at every update. bf16 numbers near w are w/128 apart: the nearest of them would not move
for many updates of 1e-6, and the gradient would be that of the weights before training (docs/precision.md). Which
neighbour it is follows from the number of updates and the parameter's place: a resumed run has the same weights. The
remainder is the lower half of the master's bits; the upper half is the weight's, or one less where it was rounded up.
"""

import torch
from torch import Tensor

STEP = 0x9E3779B1  # 2**32 over the golden ratio: numbers in a row lie far apart
FACTORS = 0x7FEB352D, 0x846CA68B  # an integer hash of low bias (Wellons 2018, github.com/skeeto/hash-prospector)
GRID = 2.0**-39  # fp16: of masters smaller than 2**-16
EXPONENT = 0x7F800000  # the bits of a float32's exponent
SMALLEST_EXPONENT = (127 - 14) << 23  # that of fp16's smallest normal number: below it the spacing stays the same
UNIT_BELOW = 25 << 23  # a remainder's unit is 2**-25 of the weight's power of two: 2**-14 of half the spacing
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


def _unit(weight: Tensor) -> Tensor:
    """What an fp16 weight's remainder counts, as float32: 2**-25 of its power of two."""
    exponent = (weight.float().view(torch.int32) & EXPONENT).clamp(min=SMALLEST_EXPONENT)
    return (exponent - UNIT_BELOW).view(torch.float32)


@torch.no_grad()
def split_(weight: Tensor, remainder: Tensor, master: Tensor, number: Tensor | int, first: int = 0) -> None:
    """weight [N], fp16 or bf16, and remainder [N], int16, become the master's, fp32 [N], after `number` updates.

    Args:
        master: may be on another device, and is computed with there.
        first: where the buffers begin in the flat buffer of all parameters.
    """
    for start in range(0, weight.numel(), _CHUNK):
        piece = slice(start, min(start + _CHUNK, weight.numel()))
        values = master[piece]
        if weight.dtype == torch.bfloat16:
            bits = values.contiguous().view(torch.int32)
            rounded = bits + random_bits(first + start, len(values), number, values.device)
            weight[piece] = (rounded & -65536).view(torch.float32)
            remainder[piece] = bits.to(torch.int16)
        else:
            values = (values / GRID).round_() * GRID + 0.0  # join gives 0 for -0
            nearest = values.half()
            weight[piece] = nearest
            remainder[piece] = ((values - nearest.float()) / _unit(nearest)).to(torch.int16)


@torch.no_grad()
def join(weight: Tensor, remainder: Tensor, number: Tensor | int, first: int = 0) -> Tensor:
    """The masters, fp32 [N], that split_ has left as `weight` and `remainder`, with the same number and place."""
    if weight.dtype != torch.bfloat16:
        return weight.float() + remainder.float() * _unit(weight)
    lower = remainder.to(torch.int32) & 0xFFFF
    carry = (lower + random_bits(first, len(weight), number, weight.device)) >> 16
    upper = weight.view(torch.int16).to(torch.int32) - carry
    return ((upper << 16) | lower).view(torch.float32)
