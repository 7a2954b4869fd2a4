"""Masters as weights and remainders: the weight is the nearest in fp16, a neighbour by chance in bf16."""

import pytest
import torch

from tests.helpers.kernels import split
from utils.kernels.rounding import GRID, join, random_bits


def rounded(master: torch.Tensor, number: int, dtype: torch.dtype = torch.bfloat16, first: int = 0) -> torch.Tensor:
    return split(master, dtype, number, first)[0]


@pytest.fixture(scope="module")
def master() -> torch.Tensor:
    return torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.1


def test_fp16_is_the_nearest(master):
    assert torch.equal(rounded(master, 7, torch.float16), master.half())


# Where fp16's spacing or what is kept of the master changes, and halfway between two neighbours.
EDGES = [0, 2.0**-14, 2.0**-14 * (1 - 2.0**-24), 2.0**-16, 2.0**-17 * (1 + 2.0**-23), 2.0**-24, 2.0**-25, 3 * 2.0**-25]
EDGES += [1, 1 - 2.0**-24, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 2 - 2.0**-23, 65504]


@pytest.fixture(scope="module")
def of_all_sizes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = 10 ** (torch.rand(50_000, generator=generator) * 14 - 10)
    signs = torch.randint(0, 2, (50_000,), generator=generator) * 2 - 1
    return torch.cat([sizes * signs, torch.tensor(EDGES), -torch.tensor(EDGES)])


@pytest.mark.parametrize(("dtype", "number"), [(torch.float16, 3), (torch.bfloat16, 3), (torch.bfloat16, 4)])
def test_the_two_halves_are_the_master(of_all_sizes, dtype, number):
    weight, remainder = split(of_all_sizes, dtype, number, first=77)
    joined = join(weight, remainder, number, first=77)
    exact = (
        torch.ones_like(of_all_sizes, dtype=torch.bool) if dtype == torch.bfloat16 else of_all_sizes.abs() >= 2**-16
    )
    assert torch.equal(joined[exact], of_all_sizes[exact])
    assert (joined.double() - of_all_sizes.double()).abs().max() <= GRID / 2
    again = split(joined, dtype, number, first=77)
    assert torch.equal(again[0].view(torch.int16), weight.view(torch.int16)) and torch.equal(again[1], remainder)


def test_masters_too_small_for_their_remainder_are_rounded_to_whole_steps(of_all_sizes):
    joined = join(*split(of_all_sizes, torch.float16, 1), 1)
    steps = joined.double() * 2.0**39
    assert torch.equal(steps, steps.round())
    assert (joined != of_all_sizes).float().mean() > 0.2  # the fixture has such


def test_bf16_is_one_of_the_two_neighbours(master):
    """Towards zero the lower 16 bits are gone; the other neighbour is one step of the upper 16 bits away."""
    smaller = (master.view(torch.int32) & -65536).view(torch.float32)
    larger = ((master.view(torch.int32) & -65536) + 65536).view(torch.float32)
    weight = rounded(master, 7).float()
    assert ((weight == smaller) | (weight == larger)).all()
    assert 0.45 < (weight == smaller).float().mean() < 0.55


def test_what_bf16_can_hold_stays(master):
    exact = master.bfloat16()
    assert torch.equal(rounded(exact.float(), 7), exact)


def test_the_mean_over_the_updates_is_the_master(master):
    """An error of one update is at most a spacing and that of the mean of n of them about spacing / sqrt(6 n)."""
    spacing = 2.0 ** (torch.floor(torch.log2(master.abs())) - 7)
    mean = torch.stack([rounded(master, number).float() for number in range(400)]).mean(0)
    errors = (mean - master) / spacing
    assert errors.abs().max() < 0.15  # about six standard deviations
    assert errors.pow(2).mean().sqrt() < 0.025 and errors.mean().abs() < 1e-3


def test_the_same_update_gives_the_same_bits_in_one_piece_or_two(master):
    whole = rounded(master, 3)
    assert torch.equal(rounded(master, 3), whole)
    assert torch.equal(torch.cat([rounded(master[:777], 3), rounded(master[777:], 3, first=777)]), whole)
    assert (rounded(master, 4) != whole).float().mean() > 0.3


def test_bits_are_those_of_the_definition_in_whole_numbers():
    def by_hand(index: int, number: int) -> int:
        mask = (1 << 32) - 1
        hashed = (index ^ (number * 0x9E3779B1)) & mask
        hashed = ((hashed ^ (hashed >> 16)) * 0x7FEB352D) & mask
        hashed = ((hashed ^ (hashed >> 15)) * 0x846CA68B) & mask
        return (hashed ^ (hashed >> 16)) & 0xFFFF

    for first, number in ((0, 0), (5, 1), (859_520_000, 399), (2**31 - 2, 2**24)):
        assert random_bits(first, 4, number, "cpu").tolist() == [by_hand(first + k, number) for k in range(4)]
