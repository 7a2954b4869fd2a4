"""AdamW with moments in 8 bits: the kernel, and its first update."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.kernels import DEVICES, INTERPRETED, TRITON_ONLY, adamw_scalars, make_eight_bit, split
from utils.kernels import operations
from utils.kernels.rounding import join


def steps(device: str, numels: list[int], weight_dtype, num_steps: int, in_a_table: bool) -> list[torch.Tensor]:
    """Weight, remainder and both moments' parts after `num_steps` updates, the third of which is skipped.

    The gradient is flat, or in a table of parameters of `numels` elements, aligned in every second step.
    """
    torch.manual_seed(0)
    numel, dtype = sum(numels), weight_dtype or torch.float32
    weight, remainder = split(torch.randn(numel, device=device) * 0.1, weight_dtype)
    moments = make_eight_bit(numel, True, device), make_eight_bit(numel, False, device)
    for step in range(1, num_steps + 1):
        grad = torch.randn(numel, device=device) * torch.logspace(-5, 0, numel, device=device)
        grad = grad.to(dtype)
        grad[300:600] = 0
        applies = step != 3
        grad[0] = grad[0] if applies else torch.nan
        before = [part.clone() for part in (moments[0].levels, moments[1].levels, weight)]
        gradients, parts = grad, [F.pad(part, (step % 2, 0))[step % 2 :] for part in grad.split(numels)]
        if in_a_table:
            gradients = operations.gradient_table(numels, dtype, device)
            gradients.set_addresses(parts)
        scalars = adamw_scalars(step, 0.25, applies, device)
        operations.adamw_8bit_(weight, remainder, gradients, *moments, scalars)
        if not applies:
            assert torch.equal(before[0], moments[0].levels) and torch.equal(before[1], moments[1].levels)
            assert torch.equal(before[2], weight)
    kept = [part for moment in moments for part in (moment.levels.float(), moment.scales)]
    return [weight, remainder, *kept]


def share_apart(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 0.0, rtol: float = 1e-6) -> float:
    return 1 - torch.isclose(ours, theirs, atol=atol, rtol=rtol).double().mean().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numels", [[100], [4096], [2048, 3000], [1023, 3, 1030, 200, 55, 2000, 692]])
def test_the_kernel_computes_what_torch_computes(device, weight_dtype, numels):
    if device == "cpu" and not INTERPRETED:
        pytest.skip(TRITON_ONLY)
    found, expected = (steps(device, numels, weight_dtype, 5, in_a_table) for in_a_table in (True, False))
    for ours, theirs in zip(found[-4:], expected[-4:], strict=True):
        assert share_apart(ours, theirs) <= 1e-3  # a level at a rounding boundary
    # The third is skipped, so the masters were split by numbers of updates up to 5 that are those of adamw_scalars.
    ours, theirs = (each[0] if weight_dtype is None else join(*each[:2], 5) for each in (found, expected))
    assert share_apart(ours, theirs, atol=1e-6, rtol=1e-5) <= 1e-3  # where that level was
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if weight_dtype:
        assert all(torch.equal(*pair) for pair in zip(found[:2], split(ours, weight_dtype, 5), strict=True))


@pytest.mark.parametrize("weight_dtype", [None, torch.float16])
def test_the_first_update_is_that_of_exact_moments(weight_dtype):
    """They are rounded after their use."""
    master, grad = torch.randn(2, 1000)
    ours, exact = split(master, weight_dtype), split(master, weight_dtype)
    scalars = adamw_scalars(1, 0.25, True, "cpu")
    grad = grad.to(weight_dtype or torch.float32)
    operations.adamw_8bit_(*ours, grad, make_eight_bit(1000, True), make_eight_bit(1000, False), scalars)
    operations.adamw_(*exact, grad, torch.zeros(1000), torch.zeros(1000), scalars)
    assert all(one is other or torch.equal(one, other) for one, other in zip(ours, exact, strict=True))
