"""What several ranks' gradients go through, in one process: DDP's buckets, and gradients that lie in them."""

import pytest
import torch

from utils.kernels.operations import GRAD_PLACE, linear
from utils.runtime import colossal
from utils.training.flat_parameters import FlatParameters
from utils.training.optimizer import MasterWeightsOptimizer


class Network(torch.nn.Module):
    """A convolution, whose gradient DDP copies, and two linear layers by kernels.operations."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.first, self.second = torch.nn.Linear(4, 5), torch.nn.Conv2d(5, 2, 1)

    def forward(self, x):
        rows = self.conv(x).permute(0, 2, 3, 1)
        rows = linear(rows, self.first.weight) + self.first.bias
        return linear(rows, self.second.weight) + self.second.bias


@pytest.fixture(params=["in buckets", "in a buffer"])
def boosted(request, monkeypatch):
    """(DDP's module, optimizer, Booster) of a rank that thinks that there is another, which has no gradients."""
    colossal.launch(0, dict, lambda own, other: [])
    torch.manual_seed(0)
    flat = FlatParameters(module := Network(), torch.float32, "cpu", torch.channels_last)
    if request.param == "in buckets":
        flat.grad = None
        for parameter in module.parameters():
            parameter.grad = None
    with monkeypatch.context() as patch:
        patch.setattr(colossal.dist, "get_world_size", lambda *_: 2)
        result = colossal.boost(module, MasterWeightsOptimizer(flat, learning_rates=[1e-3]))
    yield result
    colossal.leave()


def gradients(module, x, passes: int = 1) -> list[torch.Tensor]:
    for _ in range(passes):
        module(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_are_summed_where_they_lie(boosted, passes):
    """Four steps: DDP makes its buckets anew after the first."""
    ddp, optimizer, booster = boosted
    torch.manual_seed(0)
    plain, x = Network(), torch.randn(2, 3, 4, 4)
    for _ in range(4):
        optimizer.zero_grad()
        if passes > 1:
            with booster.no_sync(ddp, optimizer):
                gradients(ddp, x, passes - 1)
        found = gradients(ddp, x)
        colossal.sum_vectors(ddp)
        plain.zero_grad()
        torch.testing.assert_close(found, gradients(plain, x, passes))
    weights = [parameter for parameter in ddp.parameters() if parameter.dim() > 1]
    places = [getattr(weight, GRAD_PLACE, None) for weight in weights]
    if optimizer.flat.grad is not None:
        assert places == [None, None, None]
    else:
        assert [weight.grad.data_ptr() for weight in weights] == [place.data_ptr() for place in places]
        assert [weight.grad.stride() for weight in weights] == [weight.stride() for weight in weights]
