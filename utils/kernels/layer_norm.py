"""Triton LayerNorm of a sum: s = x + x_bias + residual, y = LayerNorm(s), one kernel forward and two backward.

The backward adds the gradient that reaches s by its other use (the residual stream), and reduces the gradients of
weight, bias and x_bias from per-program partial sums in a fixed order: no atomics, bit-reproducible.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels.elementwise import sum_chunks

MAX_FEATURES = 8192  # above it, a row no longer fits into registers
_MAX_PROGRAMS = 264  # two for each of an H100's processors
_STAGES = 3  # tiles of a program that are on their way at once


@triton.jit
def _forward(x_ptr, x_bias_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr, num_rows, eps,
             D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, X_BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    inside = column < D
    mask = (row < num_rows)[:, None] & inside[None, :]
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if X_BIAS:
        x += tl.load(x_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        x += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if X_BIAS or RESIDUAL:
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offset, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, 1) / D
    distance = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(distance * distance, 1) / D + eps)
    tl.store(mean_ptr + row, mean, mask=row < num_rows)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = distance * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(dy_ptr, sum_grad_ptr, sum_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, part_ptr, num_rows, num_tiles,
              D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, SUM_GRAD: tl.constexpr,
              X_BIAS: tl.constexpr):
    """dx of every `num_programs`-th tile of rows, and this program's sums over rows -> part [programs, 3, D]."""
    program = tl.program_id(0)
    column = tl.arange(0, DP)
    inside = column < D
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, DP), tl.float32)
    dbias = tl.zeros((ROWS, DP), tl.float32)
    dx_bias = tl.zeros((ROWS, DP), tl.float32)
    for tile in tl.range(program, num_tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & inside[None, :]
        offset = row.to(tl.int64)[:, None] * D + column[None, :]
        mean = tl.load(mean_ptr + row, mask=row < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        x = tl.load(sum_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        normalised = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        grad = dy * weight[None, :]
        m1 = tl.sum(grad, 1) / D
        m2 = tl.sum(grad * normalised, 1) / D
        dx = rstd[:, None] * (grad - m1[:, None] - normalised * m2[:, None])
        if SUM_GRAD:
            dx += tl.load(sum_grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += dy * normalised
        dbias += dy
        if X_BIAS:
            dx_bias += tl.where(mask, dx, 0.0)
    at = part_ptr + program * (3 * D) + column
    tl.store(at, tl.sum(dweight, 0), mask=inside)
    tl.store(at + D, tl.sum(dbias, 0), mask=inside)
    if X_BIAS:
        tl.store(at + 2 * D, tl.sum(dx_bias, 0), mask=inside)


def _tiling(num_rows: int, features: int) -> tuple[dict, int]:
    """Kernel constants, number of tiles of rows."""
    width = triton.next_power_of_2(features)
    rows = max(1, 2048 // width)
    while rows > 1 and triton.cdiv(num_rows, rows) < _MAX_PROGRAMS:
        rows //= 2
    return dict(D=features, DP=width, ROWS=rows, num_warps=4 if width <= 2048 else 8), triton.cdiv(num_rows, rows)


class AddLayerNorm(torch.autograd.Function):
    """x, residual [..., D], x_bias [D] -> s = x + x_bias + residual (x if nothing is added), LayerNorm(s)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, x_bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        features = x.shape[-1]
        num_rows = x.numel() // features
        constants, num_tiles = _tiling(num_rows, features)
        adds = residual is not None or x_bias is not None
        total = torch.empty_like(x) if adds else x
        y = torch.empty_like(x)
        mean, rstd = torch.empty(2, num_rows, dtype=torch.float32, device=x.device)
        _forward[(num_tiles,)](
            x, x_bias, residual, weight, bias, total, y, mean, rstd, num_rows, eps,
            X_BIAS=x_bias is not None, RESIDUAL=residual is not None, **constants,
        )
        ctx.save_for_backward(total, weight, mean, rstd, x_bias)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, sum_grad: Tensor, dy: Tensor) -> Any:
        total, weight, mean, rstd, x_bias = ctx.saved_tensors
        features, num_rows = total.shape[-1], mean.numel()
        if dy is None:
            dx_bias = None if x_bias is None or sum_grad is None else sum_grad.reshape(-1, features).sum(0)
            return sum_grad, None, None, sum_grad if ctx.has_residual else None, dx_bias, None
        constants, num_tiles = _tiling(num_rows, features)
        num_programs = min(num_tiles, _MAX_PROGRAMS)
        part = torch.empty(num_programs, 3, features, dtype=torch.float32, device=total.device)
        dx = torch.empty_like(total)
        grads = torch.empty(3, features, dtype=weight.dtype, device=weight.device)
        sum_grad = None if sum_grad is None else sum_grad.contiguous()
        _backward[(num_programs,)](
            dy.contiguous(), sum_grad, total, weight, mean, rstd, dx, part, num_rows, num_tiles,
            STAGES=_STAGES, SUM_GRAD=sum_grad is not None, X_BIAS=x_bias is not None, **constants,
        )
        sum_chunks(part, grads if x_bias is not None else grads[:2])
        dx_bias = None if x_bias is None else grads[2]
        return dx, grads[0], grads[1], dx if ctx.has_residual else None, dx_bias, None
