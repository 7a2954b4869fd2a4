"""A feed-forward layer's first product with GEGLU in the same kernel, for sampling on a Hopper GPU.

The product is twice as wide as what GEGLU makes of it: here it stays in registers. A program makes ROWS x COLUMNS of
the result, from as many columns of both halves; tiles of the inputs come by the GPU's own copies (TMA).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ROWS, _COLUMNS, _DEPTH = 128, 64, 64  # of a tile: with three on their way and four warps two programs fit a processor
_STAGES, _NUM_WARPS = 3, 4
_GROUP = 8  # tiles of rows that follow each other at the same columns, for the cache
_ALIGNMENT = 16  # bytes, of what a descriptor describes, and of its rows
CAPABILITY = (9, 0)  # older GPUs have no such copies; on later ones nobody has measured it


@triton.jit
def _gelu(x):
    """x times the normal distribution at x.

    erf is Abramowitz and Stegun's 7.1.26, right to 1.5e-7: the library's takes a third longer, and nothing hides it.
    """
    distance = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * distance)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * tl.exp(-distance * distance)
    return x * tl.where(x >= 0.0, 1.0 - tail, tail)


@triton.jit(do_not_specialize=["num_rows", "D", "depth"])
def _geglu_product(x, weight, bias_ptr, y, num_rows, D, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   DEPTH: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr):
    """Descriptors of x [num_rows, depth], weight [2, D, depth], y [num_rows, D]; bias [2D]."""
    num_blocks = tl.cdiv(D, COLUMNS)
    group, within = tl.program_id(0) // (GROUP * num_blocks), tl.program_id(0) % (GROUP * num_blocks)
    height = tl.minimum(tl.cdiv(num_rows, ROWS) - group * GROUP, GROUP)
    row, column = (group * GROUP + within % height) * ROWS, within // height * COLUMNS
    product = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for k in tl.range(0, depth, DEPTH, num_stages=STAGES):
        both_halves = tl.reshape(weight.load([0, column, k]), (2 * COLUMNS, DEPTH))
        product = tl.dot(x.load([row, k]), tl.trans(both_halves), product)
    hidden, gate = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS)), (0, 2, 1)))
    lane = column + tl.arange(0, COLUMNS)
    hidden += tl.load(bias_ptr + lane, mask=lane < D, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias_ptr + D + lane, mask=lane < D, other=0.0).to(tl.float32)[None, :]
    y.store([row, column], (hidden * _gelu(gate)).to(y.dtype))


def is_multipliable(x: Tensor, weight: Tensor) -> bool:
    """Whether geglu_product takes x [..., K] and weight [2D, K]: of 16 bits, aligned, on a GPU that has the copies."""
    is_hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device) == CAPABILITY
    sizes = weight.shape[1], weight.shape[0] // 2
    is_aligned = all(size * weight.element_size() % _ALIGNMENT == 0 for size in sizes)
    is_aligned &= all(tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0 for tensor in (x, weight))
    return is_hopper and is_aligned and x.dtype == weight.dtype != torch.float32


def geglu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K] @ weight [2D, K].T + bias [2D] -> the first half times gelu of the second, [..., D]."""
    x_rows, width = x.flatten(0, -2), weight.shape[0] // 2
    num_rows, depth = x_rows.shape
    y = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    describe = TensorDescriptor.from_tensor
    inputs = describe(x_rows, [_ROWS, _DEPTH]), describe(weight.view(2, width, depth), [2, _COLUMNS, _DEPTH])
    _geglu_product[(triton.cdiv(num_rows, _ROWS) * triton.cdiv(width, _COLUMNS),)](
        *inputs, bias, describe(y, [_ROWS, _COLUMNS]), num_rows, width, depth, ROWS=_ROWS, COLUMNS=_COLUMNS,
        DEPTH=_DEPTH, STAGES=_STAGES, GROUP=_GROUP, num_warps=_NUM_WARPS,
    )
    return y.view(*x.shape[:-1], width)
