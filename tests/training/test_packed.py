"""Masters in pieces; moments in 8 bits: what they lose, and that they lose it once."""

import pytest
import torch

from tests.helpers.kernels import make_eight_bit
from utils.training.packed import BLOCK, Masters


def wide_values(numel: int, signed: bool) -> torch.Tensor:
    """Of magnitudes from 1e-30 to 1e3, one block of zeros among them."""
    values = torch.randn(numel) * torch.logspace(-30, 3, numel)
    values[BLOCK : 2 * BLOCK] = 0
    values[3 * BLOCK + 5 :: 1000] = 0
    return values if signed else values.square()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("numel", [1, 255, 256, 10_000])
def test_quantising_what_was_dequantised_gives_the_same_bits(signed, numel):
    first, second = make_eight_bit(numel, signed), make_eight_bit(numel, signed)
    first.pack_(wide_values(numel, signed))
    values = first.unpack()
    second.pack_(values)
    assert values.shape == (numel,) and values.isfinite().all()
    assert torch.equal(first.levels, second.levels) and torch.equal(first.scales, second.scales)
    assert torch.equal(values, second.unpack())


@pytest.mark.parametrize("signed", [True, False])
def test_how_near_the_values_are(signed):
    values = torch.randn(100 * BLOCK)
    values = values if signed else values.square()
    eight_bit = make_eight_bit(len(values), signed)
    eight_bit.pack_(values)
    blocks, found = values.view(-1, BLOCK), eight_bit.unpack().view(-1, BLOCK)
    largest = blocks.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(found.gather(1, largest), blocks.gather(1, largest), rtol=1e-6, atol=0)
    assert ((found - blocks).norm() / blocks.norm()).item() < (0.01 if signed else 0.006)
    assert torch.equal(found == 0, blocks == 0) or signed  # the update divides by the second moment's root


def test_a_second_moment_that_is_not_zero_stays_so():
    """However small beside the largest of its block: the update divides by it."""
    values = torch.logspace(-13, 0, BLOCK)
    values[7] = 0
    eight_bit = make_eight_bit(BLOCK, False)
    eight_bit.pack_(values)
    assert torch.equal(eight_bit.unpack() == 0, values == 0)


def test_slices_and_pieces(monkeypatch):
    monkeypatch.setattr("utils.training.packed._PIECE", 2 * BLOCK)
    values, device = torch.randn(5 * BLOCK + 3), torch.device("cpu")
    whole, in_pieces = make_eight_bit(len(values), True), make_eight_bit(len(values), True)
    whole.pack_(values)
    in_pieces.write_from(values, device)
    assert torch.equal(whole.levels, in_pieces.levels) and torch.equal(whole.scales, in_pieces.scales)
    assert [piece.stop for piece in whole.pieces()] == [2 * BLOCK, 4 * BLOCK, 5 * BLOCK + 3]
    read = torch.empty_like(values)
    whole.read_into(read, device)
    assert torch.equal(read, whole.unpack())
    assert torch.equal(whole[slice(BLOCK, 3 * BLOCK)].unpack(), read[BLOCK : 3 * BLOCK])


def make_masters(dtype: torch.dtype) -> Masters:
    remainder = None if dtype == torch.float32 else torch.zeros(1000, dtype=torch.int16)
    return Masters(torch.zeros(1000, dtype=dtype), remainder, torch.tensor(7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masters_whole_and_in_pieces_are_the_same(monkeypatch, dtype):
    monkeypatch.setattr("utils.training.packed._PIECE", 300)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, in_pieces, device = make_masters(dtype), make_masters(dtype), torch.device("cpu")
    whole.pack_(values)
    in_pieces.write_from(values, device)
    assert torch.equal(whole.weight, in_pieces.weight)
    assert dtype == torch.float32 or torch.equal(whole.remainder, in_pieces.remainder)
    read = torch.empty(1000)
    whole.read_into(read, device)
    assert torch.equal(read, values) and torch.equal(whole.unpack(), values)
    assert torch.equal(whole[slice(100, 900)][slice(50, 60)].unpack(), values[150:160])
