"""AdamW and the gradient norm against torch's own: by Triton on a GPU or interpreted, else by torch."""

import pytest
import torch

from tests.helpers.kernels import DEVICES, INTERPRETED, TRITON_ONLY, adamw_scalars, relative_error, split
from utils.kernels import operations
from utils.kernels.rounding import join


def adamw_state(num, weight_dtype, device):
    """Weights, remainders and moments of masters of which fp16 keeps a quarter to 2**-40."""
    master = torch.randn(num, device=device) * 0.1
    master[::4] *= 1e-5
    return *split(master, weight_dtype), torch.zeros_like(master), torch.zeros_like(master)


def masters(state, number):
    weight, remainder = state[:2]
    return weight.clone() if remainder is None else join(weight, remainder, number)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.bfloat16])
def test_adamw_is_torch_adamw(device, weight_dtype):
    state = adamw_state(5003, weight_dtype, device)
    start = masters(state, 0)
    expected = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([expected], lr=1e-3, weight_decay=1e-2)
    for step in range(1, 21):
        grad = torch.randn(5003, device=device).to(weight_dtype or torch.float32)
        operations.adamw_(*state[:2], grad, *state[2:], adamw_scalars(step, 0.25, True, device))
        expected.grad = grad.float() * 0.25
        optimizer.step()
    assert relative_error(masters(state, 20) - start, expected.detach() - start) < 1e-4
    if weight_dtype is not None:
        by_definition = split(masters(state, 20), weight_dtype, 20)
        assert all(torch.equal(*pair) for pair in zip(state, by_definition, strict=False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16])
def test_an_update_without_a_learning_rate_leaves_the_masters(device, weight_dtype):
    """Taken apart and put together again, in either half's place, they are what they were, to the bit."""
    state = adamw_state(5003, weight_dtype, device)
    start = masters(state, 0)
    for step in (1, 2, 3):
        grad = torch.randn(5003, device=device).to(weight_dtype)
        operations.adamw_(*state[:2], grad, *state[2:], adamw_scalars(step, 0.25, True, device, lr=0.0))
        assert torch.equal(masters(state, step), start)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("numels", "aligned"),
    [
        ((2048, 1024, 3000, 8, 512), True),
        ((8, 1024, 2051), True),
        ((5, 1024, 2051, 4096), False),
        ((1023, 3, 2049, 1024), False),
    ],
)
def test_the_kernel_computes_what_torch_computes(monkeypatch, device, weight_dtype, numels, aligned):
    """Three updates, the second of which is skipped; also of parameters at odd offsets of the flat buffer."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip(TRITON_ONLY)
    if INTERPRETED:  # one program after the other
        monkeypatch.setattr(operations.adamw, "_NORM_PROGRAMS", 8)
    table = operations.gradient_table(list(numels), weight_dtype or torch.float32, device)
    assert table.is_aligned == aligned
    expected = adamw_state(sum(numels), weight_dtype, device)
    state = [None if buffer is None else buffer.clone() for buffer in expected]
    start = masters(state, 0)
    dtype = weight_dtype or torch.float32
    norms = torch.zeros(2, 1, device=device)
    for step, applies in ((1, True), (2, False), (3, True)):
        grad = torch.randn(sum(numels), device=device).to(dtype)
        grad = grad if applies else torch.full_like(grad, torch.nan)
        pieces = [piece.clone() for piece in grad.split(list(numels))]
        table.set_addresses(pieces)
        operations.grad_norm_(grad, norms[0])
        operations.grad_norm_(table, norms[1])
        assert relative_error(*norms) < 1e-5 if applies else norms.isnan().all()
        scalars = adamw_scalars(step, 0.25, applies, device)
        before = [None if buffer is None else buffer.clone() for buffer in state]
        operations.adamw_(*expected[:2], grad, *expected[2:], scalars)
        operations.adamw_(*state[:2], table, *state[2:], scalars)
        assert applies or all(now is None or torch.equal(now, then) for now, then in zip(state, before, strict=True))
    number = scalars[-1].int()
    change, expected_change = masters(state, number) - start, masters(expected, number) - start
    assert relative_error(change, expected_change) < 1e-4
    assert max(relative_error(*pair) for pair in zip(state[2:], expected[2:], strict=True)) < 1e-6
    if weight_dtype is not None:
        by_definition = split(masters(state, number), weight_dtype, number)
        assert all(torch.equal(*pair) for pair in zip(state, by_definition, strict=False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num", [1, 4097, 100_003])
def test_grad_norm(device, num):
    for dtype in (torch.float16, torch.float32):
        grad = torch.randn(num, device=device).to(dtype)
        out = torch.zeros(1, device=device)
        operations.grad_norm_(grad, out)
        assert relative_error(out, grad.double().norm()) < 1e-6
    for value in (torch.inf, torch.nan):
        grad[num // 2] = value
        operations.grad_norm_(grad, out)
        assert not out.isfinite()


@pytest.mark.parametrize("num", [7_000_000, pytest.param(860_000_000, marks=pytest.mark.slow)])
def test_the_norm_of_a_whole_model(num):
    """One sum of so many squares in fp32 is 2e-4 too small at the embedded model's size, 0.16 at the real one's."""
    grad = torch.arange(1, 1001).float().mul_(1e-6).repeat(num // 1000)  # the mean of n**2 up to 1000 is 333833.5
    out = torch.zeros(1)
    operations.grad_norm_(grad, out)
    assert out.item() == pytest.approx(1e-6 * (333833.5 * num) ** 0.5, rel=1e-6)
