"""Sums over a matrix's rows, in fp32, in two kernels: chunks of rows, then the chunks in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WANTED_PROGRAMS = 528  # four for each of an H100's processors
_COLUMNS, _ROWS, _STAGES = 64, 32, 2  # of a tile
_SUMMED = 32  # columns of which one program adds the chunks up


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


def chunks_of_columns(num_rows: int, rows: int, num_blocks: int) -> tuple[int, int]:
    """As `chunks`, as many as keep a GPU busy if each is summed in so many blocks of columns."""
    return chunks(num_rows, rows, triton.cdiv(_WANTED_PROGRAMS, num_blocks))


def sum_chunks(part: Tensor, out: Tensor) -> None:
    """out [N] = the sum of part [chunks, N or more] over the chunks, in a fixed order."""
    num_chunks, stride = part.shape[0], part.stride(0)
    _sum_chunks[(triton.cdiv(out.numel(), _SUMMED),)](
        part, out, num_chunks, out.numel(), stride, CHUNKS=triton.next_power_of_2(num_chunks), COLUMNS=_SUMMED
    )


def column_sums(x: Tensor, num_columns: int) -> Tensor:
    """The sums [num_columns], in x's dtype, over the rows of dense x, whose values lie row by row."""
    num_rows = x.numel() // num_columns
    num_blocks = triton.cdiv(num_columns, _COLUMNS)
    length, num_chunks = chunks_of_columns(num_rows, _ROWS, num_blocks)
    part = torch.empty(num_chunks, num_columns, dtype=torch.float32, device=x.device)
    out = torch.empty(num_columns, dtype=x.dtype, device=x.device)
    _chunk_sums[(num_blocks, num_chunks)](
        x, part, num_rows, length, num_columns, COLUMNS=_COLUMNS, ROWS=_ROWS, STAGES=_STAGES
    )
    sum_chunks(part, out)
    return out
