"""The backward of attention to a few keys, as to a prompt's tokens, with all of them in one program.

A kernel that walks over the keys has as many programs as there are blocks of keys: one or two here, for thousands of
queries. This one walks over the queries. All scores of a query are in one program, so its softmax needs nothing from
the forward pass but the inputs. Each chunk of queries writes its share of the keys' and values' gradients, which are
added up in a fixed order: no atomics, bit-reproducible.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.kernels.elementwise import chunks, sum_chunks

_MIN_QUERIES = 1024  # below it, torch's own takes no longer
_MAX_KEYS, _MAX_WIDTH = 128, 64  # above them, keys and values no longer fit into registers and shared memory
OLDEST = (8, 0)  # older GPUs have too little of both
_QUERIES, _NUM_WARPS = 32, 8  # of a program at a time
_WANTED_PROGRAMS = 132  # one for each of an H100's processors: no more fit


@triton.jit(do_not_specialize=["num_queries", "num_keys", "length", "heads"])
def _short_attention_backward(q_ptr, k_ptr, v_ptr, dy_ptr, dq_ptr, part_ptr, scale, num_queries, num_keys, length,
                              heads, q_image, q_row, k_image, k_row, v_image, v_row, dy_image, dy_row,
                              D: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, QUERIES: tl.constexpr):
    """dq [B, T, H, D] of a chunk of queries, and its share of dk and dv -> part [chunks, B, 2, keys, H, D].

    The inputs are [B, rows, H, D] too, with their own strides of image and row.
    """
    chunk, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, DP)
    key = tl.arange(0, KP)
    exists = (key < num_keys)[:, None] & (lane < D)[None, :]
    k = tl.load(k_ptr + image * k_image + head * D + key[:, None] * k_row + lane[None, :], mask=exists, other=0.0)
    v = tl.load(v_ptr + image * v_image + head * D + key[:, None] * v_row + lane[None, :], mask=exists, other=0.0)
    dk = tl.zeros((KP, DP), tl.float32)
    dv = tl.zeros((KP, DP), tl.float32)
    q_ptr += image.to(tl.int64) * q_image + head * D
    dy_ptr += image.to(tl.int64) * dy_image + head * D
    dq_ptr += (image.to(tl.int64) * num_queries * heads + head) * D
    end = tl.minimum((chunk + 1) * length, num_queries)
    for first in range(chunk * length, end, QUERIES):
        row = first + tl.arange(0, QUERIES)
        mask = (row < end)[:, None] & (lane < D)[None, :]
        q = tl.load(q_ptr + row[:, None] * q_row + lane[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_row + lane[None, :], mask=mask, other=0.0)
        scores = tl.where((key < num_keys)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        exponential = tl.exp(scores - tl.max(scores, 1)[:, None])
        probability = exponential / tl.sum(exponential, 1)[:, None]
        grad = tl.dot(dy, tl.trans(v))
        grad = probability * (grad - tl.sum(probability * grad, 1)[:, None]) * scale
        grad = grad.to(q.dtype)
        at = dq_ptr + row[:, None] * (heads * D) + lane[None, :]
        tl.store(at, tl.dot(grad, k).to(dq_ptr.dtype.element_ty), mask=mask)
        dk += tl.dot(tl.trans(grad), q)
        dv += tl.dot(tl.trans(probability.to(q.dtype)), dy)
    images = tl.num_programs(2)
    at = part_ptr + (((chunk * images + image) * 2 * num_keys + key[:, None]) * heads + head) * D + lane[None, :]
    tl.store(at, dk, mask=exists)
    tl.store(at + num_keys * heads * D, dv, mask=exists)


def is_short(query: Tensor, key: Tensor) -> bool:
    """Whether ShortAttention is made for such a query [B, H, T, D] and key [B, H, S, D]."""
    is_old = query.is_cuda and torch.cuda.get_device_capability(query.device) < OLDEST
    fits = key.shape[2] <= _MAX_KEYS and query.shape[3] <= _MAX_WIDTH and query.shape[2] >= _MIN_QUERIES
    return fits and query.dtype != torch.float32 and not is_old


def _with_heads_inside(x: Tensor) -> Tensor:
    """x [B, H, rows, D], copied if a row's heads do not lie one after the other."""
    return x if x.stride()[1::2] == (x.shape[3], 1) else x.transpose(1, 2).contiguous().transpose(1, 2)


class ShortAttention(torch.autograd.Function):
    """scaled_dot_product_attention of query [B, H, T, D], key and value [B, H, S, D], fp16 or bf16 -> [B, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        inputs = [_with_heads_inside(x) for x in (*ctx.saved_tensors, dy)]
        query, key = inputs[:2]
        images, heads, num_queries, width = query.shape
        num_keys = key.shape[2]
        length, num_chunks = chunks(num_queries, _QUERIES, max(1, _WANTED_PROGRAMS // (images * heads)))
        dq = torch.empty(images, num_queries, heads, width, dtype=query.dtype, device=query.device)
        part = torch.empty(num_chunks, images, 2, num_keys, heads, width, dtype=torch.float32, device=query.device)
        grads = torch.empty(part.shape[1:], dtype=query.dtype, device=query.device)
        strides = [x.stride(dim) for x in inputs for dim in (0, 2)]
        _short_attention_backward[(num_chunks, heads, images)](
            *inputs, dq, part, width**-0.5, num_queries, num_keys, length, heads, *strides, D=width,
            DP=max(16, triton.next_power_of_2(width)), KP=max(16, triton.next_power_of_2(num_keys)),
            QUERIES=_QUERIES, num_warps=_NUM_WARPS,
        )
        sum_chunks(part, grads)
        dk, dv = grads.transpose(2, 3).unbind(1)
        return dq.transpose(1, 2), dk, dv
