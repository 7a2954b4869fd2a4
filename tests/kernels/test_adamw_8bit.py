"""AdamW with moments in 8 bits: the kernel, and its first update."""

import pytest
import torch

from tests.helpers.kernels import DEVICES, INTERPRETED, TRITON_ONLY, adamw_scalars, make_eight_bit, split
from utils.kernels import operations
from utils.kernels.rounding import join


def steps(device: str, numel: int, weight_dtype, num_steps: int, update) -> list[torch.Tensor]:
    """Weight, remainder and both moments' parts after `num_steps` of `update`, the third of which is skipped."""
    torch.manual_seed(0)
    weight, remainder = split(torch.randn(numel, device=device) * 0.1, weight_dtype)
    moments = make_eight_bit(numel, True, device), make_eight_bit(numel, False, device)
    for step in range(1, num_steps + 1):
        grad = torch.randn(numel, device=device) * torch.logspace(-5, 0, numel, device=device)
        grad = grad.to(weight_dtype or torch.float32)
        grad[300:600] = 0
        applies = step != 3
        grad[0] = grad[0] if applies else torch.nan
        before = [part.clone() for part in (moments[0].levels, moments[1].levels, weight)]
        update(weight, remainder, grad, *moments, adamw_scalars(step, 0.25, applies, device))
        if not applies:
            assert torch.equal(before[0], moments[0].levels) and torch.equal(before[1], moments[1].levels)
            assert torch.equal(before[2], weight)
    parts = [part for moment in moments for part in (moment.levels.float(), moment.scales)]
    return [weight, remainder, *parts]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numel", [100, 4096, 5003])
def test_the_kernel_computes_what_torch_computes(device, weight_dtype, numel, monkeypatch):
    if device == "cpu" and not INTERPRETED:
        pytest.skip(TRITON_ONLY)
    found = steps(device, numel, weight_dtype, 5, operations.adamw_8bit_)
    monkeypatch.setattr(operations, "runs_triton", lambda x: False)
    expected = steps(device, numel, weight_dtype, 5, operations.adamw_8bit_)
    for ours, theirs in zip(found[-4:], expected[-4:], strict=True):
        assert ((ours - theirs).abs() > 1e-6 * theirs.abs()).double().mean() <= 1e-3  # a level at a rounding boundary
    # The third is skipped, so the masters were split by numbers of updates up to 5 that are those of adamw_scalars.
    ours, theirs = (each[0] if weight_dtype is None else join(*each[:2], 5) for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if weight_dtype:
        assert all(torch.equal(*pair) for pair in zip(found[:2], split(ours, weight_dtype, 5), strict=True))


@pytest.mark.parametrize("weight_dtype", [None, torch.float16])
def test_the_first_update_is_that_of_exact_moments(weight_dtype):
    """They are rounded after their use. To the bit in plain torch; a kernel multiplies and adds in another order."""
    master, grad = torch.randn(2, 1000)
    ours, exact = split(master, weight_dtype), split(master, weight_dtype)
    scalars = adamw_scalars(1, 0.25, True, "cpu")
    grad = grad.to(weight_dtype or torch.float32)
    operations.adamw_8bit_(*ours, grad, make_eight_bit(1000, True), make_eight_bit(1000, False), scalars)
    operations.adamw_(*exact, grad, torch.zeros(1000), torch.zeros(1000), scalars)
    tolerance = 1e-6 if operations.runs_triton(grad) else 0.0
    ours, exact = (each[0] if weight_dtype is None else join(*each, 1) for each in (ours, exact))
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
