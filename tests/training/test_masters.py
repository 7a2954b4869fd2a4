"""Masters in pieces, and those of float32 weights."""

import pytest
import torch

from utils.training.masters import Masters

NUMEL = 1000


def make_masters(dtype: torch.dtype) -> Masters:
    remainder = None if dtype == torch.float32 else torch.zeros(NUMEL, dtype=torch.int16)
    return Masters(torch.zeros(NUMEL, dtype=dtype), remainder, torch.tensor(7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_whole_and_in_pieces_they_are_the_same(monkeypatch, dtype):
    monkeypatch.setattr("utils.training.packed._PIECE", 300)
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
    whole, in_pieces, device = make_masters(dtype), make_masters(dtype), torch.device("cpu")
    whole.pack_(values)
    in_pieces.write_from(values, device)
    assert torch.equal(whole.weight, in_pieces.weight)
    assert dtype == torch.float32 or torch.equal(whole.remainder, in_pieces.remainder)
    read = torch.empty(NUMEL)
    whole.read_into(read, device)
    assert torch.equal(read, values) and torch.equal(whole.unpack(), values)
    assert torch.equal(whole[slice(100, 900)][slice(50, 60)].unpack(), values[150:160])
