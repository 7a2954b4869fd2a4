"""AdamW on flat buffers: torch's AdamW, the skip rule, the loss scale, clipping."""

import math

import pytest
import torch

from tests.helpers.modules import make_module, make_optimizer
from utils.training.flat_parameters import FlatParameters
from utils.training.optimizer import MasterWeightsOptimizer


def set_gradients(optimizer, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    optimizer.flat.grad.copy_(torch.randn(optimizer.flat.grad.shape, generator=generator) * scale)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_updates_are_those_of_torch_adamw(max_grad_norm, monkeypatch):
    monkeypatch.setattr("utils.kernels.operations._CHUNK", 100)  # of 869 parameters
    options = dict(betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    module, optimizer = make_optimizer(max_grad_norm=max_grad_norm, **options)
    reference = make_module().double()
    torch_optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, **options)
    for step in range(20):
        set_gradients(optimizer, step)
        for parameter, grad in zip(reference.parameters(), optimizer.flat.views(optimizer.flat.grad), strict=True):
            parameter.grad = grad.double()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
        torch_optimizer.step()
        optimizer.step()
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_and_halves_the_scale(bad):
    _, optimizer = make_optimizer(torch.float16, initial_scale=1024.0)
    set_gradients(optimizer, 0)
    optimizer.step()
    parts = (optimizer.flat.weight, optimizer.flat.masters.remainder, optimizer.exp_avg, optimizer.exp_avg_sq)
    before = [part.clone() for part in parts]
    set_gradients(optimizer, 1)
    optimizer.flat.grad[3] = bad
    metrics = optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, parts, strict=True))
    assert metrics["skipped"] == 1 and metrics["loss_scale"] == 1024
    assert (optimizer.loss_scale, optimizer.num_skipped, optimizer.num_applied) == (512, 1, 1)


def test_a_skipped_step_does_not_advance_the_schedule():
    module = make_module()
    flat = FlatParameters(module, torch.float16, "cpu")
    optimizer = MasterWeightsOptimizer(flat, learning_rates=[1.0, 2.0, 3.0])
    rates = []
    for step, bad in enumerate([False, True, True, False, False, False]):
        set_gradients(optimizer, step)
        if bad:
            flat.grad[0] = math.inf
        rates.append(optimizer.step()["lr"].item())
    assert rates == [1, 2, 2, 2, 3, 3]


def test_the_scale_doubles_after_the_interval_and_starts_counting_anew():
    _, optimizer = make_optimizer(torch.float16, initial_scale=8.0, growth_interval=3)
    scales = []
    for step in range(7):
        set_gradients(optimizer, step)
        if step == 1:
            optimizer.flat.grad[0] = math.nan
        optimizer.step()
        scales.append(optimizer.loss_scale.item())
    assert scales == [8, 4, 4, 4, 8, 8, 8]


def test_only_fp16_scales_the_loss():
    for dtype, scale in ((torch.float16, 2.0**16), (torch.bfloat16, 1.0), (torch.float32, 1.0)):
        module, optimizer = make_optimizer(dtype)
        optimizer.backward(module(torch.ones(1, 3, 6, 6, dtype=dtype)).float().sum() * 1e-3)
        assert optimizer.loss_scale == scale
        bias_gradient = optimizer.flat.views(optimizer.flat.grad)[-1].float()
        torch.testing.assert_close(bias_gradient, torch.full((5,), 1e-3 * scale), rtol=1e-2, atol=0)


def test_gradients_are_clipped_after_unscaling():
    _, optimizer = make_optimizer(torch.float16, initial_scale=256.0, max_grad_norm=1.0)
    set_gradients(optimizer, 0, scale=256.0)
    expected = optimizer.flat.grad.float().norm() / 256
    assert expected > 1
    metrics = optimizer.step()
    torch.testing.assert_close(metrics["grad_norm"], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(optimizer.exp_avg.norm(), torch.tensor(0.1), rtol=1e-3, atol=0)
