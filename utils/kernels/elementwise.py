"""Triton GEGLU, and the sum of channels_last images and their convolutions' biases: one kernel each way.

The biases' gradients are sums over rows, in fp32, in two kernels: chunks of rows, then the chunks in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_GEGLU_COLUMNS = 256  # of a forward tile; divides the feed-forward widths of Stable Diffusion: 1280, 2560, 5120
_COLUMNS, _ROWS, _STAGES = 128, 16, 2  # of a backward tile, and how many tiles of a program are on their way
_SUM_CHANNELS = 64  # divides its channel counts
_SUM_COLUMNS, _SUM_ROWS = 64, 32  # of a tile of column_sums
_SUMMED = 32  # columns of which one program adds the chunks up
_WANTED_PROGRAMS = 528  # four for each of an H100's processors


@triton.jit(do_not_specialize=["num_rows", "length"])
def _chunk_sums(x_ptr, part_ptr, num_rows, length, num_columns, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                STAGES: tl.constexpr):
    """The sums of x [num_rows, num_columns] over each `length` rows -> part [chunks, num_columns]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((tl.program_id(1) + 1) * length, num_rows)
    for first in tl.range(tl.program_id(1) * length, end, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        at = x_ptr + row.to(tl.int64)[:, None] * num_columns + column[None, :]
        total += tl.load(at, mask=(row < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(part_ptr + tl.program_id(1) * num_columns + column, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["num_chunks"])
def _sum_chunks(part_ptr, out_ptr, num_chunks, num_columns, stride, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    """part [num_chunks, stride] -> out [num_columns], the first of its columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.arange(0, CHUNKS)
    mask = (chunk < num_chunks)[:, None] & (column < num_columns)[None, :]
    total = tl.sum(tl.load(part_ptr + chunk[:, None] * stride + column[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=column < num_columns)


def chunks(num_rows: int, rows: int, wanted: int) -> tuple[int, int]:
    """(length, number) of at most `wanted` chunks of the rows; the length is a multiple of `rows`."""
    wanted = min(wanted, triton.cdiv(num_rows, rows))
    length = triton.cdiv(triton.cdiv(num_rows, wanted), rows) * rows
    return length, triton.cdiv(num_rows, length)


def sum_chunks(part: Tensor, out: Tensor) -> None:
    """out [N] = the sum of part [chunks, N or more] over the chunks, in a fixed order."""
    num_chunks, stride = part.shape[0], part.stride(0)
    _sum_chunks[(triton.cdiv(out.numel(), _SUMMED),)](
        part, out, num_chunks, out.numel(), stride, CHUNKS=triton.next_power_of_2(num_chunks), COLUMNS=_SUMMED
    )


def column_sums(x: Tensor, num_columns: int) -> Tensor:
    """The sums [num_columns], in x's dtype, over the rows of dense x, whose values lie row by row."""
    num_rows = x.numel() // num_columns
    num_blocks = triton.cdiv(num_columns, _SUM_COLUMNS)
    length, num_chunks = chunks(num_rows, _SUM_ROWS, triton.cdiv(_WANTED_PROGRAMS, num_blocks))
    part = torch.empty(num_chunks, num_columns, dtype=torch.float32, device=x.device)
    out = torch.empty(num_columns, dtype=x.dtype, device=x.device)
    _chunk_sums[(num_blocks, num_chunks)](
        x, part, num_rows, length, num_columns, COLUMNS=_SUM_COLUMNS, ROWS=_SUM_ROWS, STAGES=_STAGES
    )
    sum_chunks(part, out)
    return out


@triton.jit
def _geglu_inputs(x_ptr, bias_ptr, row, column, num_rows, D, BIAS: tl.constexpr):
    """Both halves of x + bias, fp32 [ROWS, COLUMNS], the offset of the first, and which exist."""
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * D) + column[None, :]
    hidden = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + D, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        hidden += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return hidden, gate, at, mask


@triton.jit
def _geglu_forward(x_ptr, bias_ptr, y_ptr, num_rows, D, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
                   BIAS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    hidden, gate, _, mask = _geglu_inputs(x_ptr, bias_ptr, row, column, num_rows, D, BIAS)
    y = hidden * gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    tl.store(y_ptr + row.to(tl.int64)[:, None] * D + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "length"])
def _geglu_backward(dy_ptr, x_ptr, bias_ptr, dx_ptr, part_ptr, num_rows, length, D, COLUMNS: tl.constexpr,
                    ROWS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr):
    """dx of each `length` rows, and their sums over these rows -> part [chunks, 2D]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    hidden_grads = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate_grads = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((tl.program_id(1) + 1) * length, num_rows)
    for first in tl.range(tl.program_id(1) * length, end, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        hidden, gate, at, mask = _geglu_inputs(x_ptr, bias_ptr, row, column, end, D, BIAS)
        dy = tl.load(dy_ptr + row.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        hidden_grad, gate_grad = dy * gate * cdf, dy * hidden * (cdf + gate * density)
        tl.store(dx_ptr + at, hidden_grad.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + at + D, gate_grad.to(dx_ptr.dtype.element_ty), mask=mask)
        if BIAS:
            hidden_grads += hidden_grad
            gate_grads += gate_grad
    if BIAS:
        at = part_ptr + tl.program_id(1) * (2 * D) + column
        tl.store(at, tl.sum(hidden_grads, 0), mask=column < D)
        tl.store(at + D, tl.sum(gate_grads, 0), mask=column < D)


@triton.jit
def _sum_forward(x_ptr, residual_ptr, bias_ptr, residual_bias_ptr, y_ptr, num_rows, C, COLUMNS: tl.constexpr,
                 ROWS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL_BIAS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = column < C
    mask = (row < num_rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL_BIAS:
        y += tl.load(residual_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def _rows(num_rows: int) -> int:
    """Rows of a tile: fewer for a small matrix, so that there are tiles for every processor."""
    return 8 if num_rows >= 1024 else 4 if num_rows >= 256 else 2


class Geglu(torch.autograd.Function):
    """x [..., 2D], contiguous, + bias [2D] or None -> its first half times gelu (with erf) of its second, [..., D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        width = x.shape[-1] // 2
        num_rows = x.numel() // x.shape[-1]
        y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
        rows = _rows(num_rows)
        grid = (triton.cdiv(width, _GEGLU_COLUMNS), triton.cdiv(num_rows, rows))
        _geglu_forward[grid](x, bias, y, num_rows, D=width, COLUMNS=_GEGLU_COLUMNS, ROWS=rows, BIAS=bias is not None)
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        width = x.shape[-1] // 2
        num_rows = x.numel() // x.shape[-1]
        dx = torch.empty_like(x)
        num_blocks = triton.cdiv(width, _COLUMNS)
        length, num_chunks = chunks(num_rows, _ROWS, triton.cdiv(_WANTED_PROGRAMS, num_blocks))
        part = torch.empty(num_chunks, 2 * width, dtype=torch.float32, device=x.device)
        _geglu_backward[(num_blocks, num_chunks)](
            dy.contiguous(), x, bias, dx, part, num_rows, length, D=width, COLUMNS=_COLUMNS, ROWS=_ROWS,
            STAGES=_STAGES, BIAS=bias is not None,
        )
        if bias is None:
            return dx, None
        dbias = torch.empty_like(bias)
        sum_chunks(part, dbias)
        return dx, dbias


class AddBiasResidual(torch.autograd.Function):
    """x + bias + residual + residual_bias, channels_last [B, C, H, W]; one reduction makes both biases' gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, bias: Tensor | None, residual_bias: Tensor | None
    ) -> Tensor:
        channels = x.shape[1]
        num_rows = x.numel() // channels
        y = torch.empty_like(x, memory_format=torch.channels_last)
        rows = 4 * _rows(num_rows)
        _sum_forward[(triton.cdiv(channels, _SUM_CHANNELS), triton.cdiv(num_rows, rows))](
            x, residual, bias, residual_bias, y, num_rows, C=channels, COLUMNS=_SUM_CHANNELS, ROWS=rows,
            BIAS=bias is not None, RESIDUAL_BIAS=residual_bias is not None,
        )
        ctx.has_bias = bias is not None, residual_bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dy = dy.contiguous(memory_format=torch.channels_last)
        dbias = column_sums(dy, dy.shape[1]) if any(ctx.has_bias) else None
        return dy, dy, *(dbias if has_bias else None for has_bias in ctx.has_bias)
