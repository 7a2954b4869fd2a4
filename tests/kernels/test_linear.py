"""Linear layers without a bias: one product for neighbours, gradients in their place."""

import pytest
import torch
import torch.nn.functional as F

from utils.kernels import linear
from utils.kernels.linear import GRAD_PLACE, are_neighbours, project


@pytest.fixture
def weights() -> list[torch.nn.Parameter]:
    """Three weights [5, 6] that are neighbours in memory."""
    buffer = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    return [torch.nn.Parameter(weight) for weight in buffer]


def gradients(outputs, weights, x) -> list[torch.Tensor]:
    """Those of a loss that tells the outputs apart, of x and of the weights; the weights' are left in `grad`."""
    x.grad = None
    sum((k * output.square()).sum() for k, output in enumerate(outputs, 1)).backward()
    return [x.grad, *(weight.grad for weight in weights)]


def expected(weights, x) -> list[torch.Tensor]:
    plain = [weight.detach().clone().requires_grad_() for weight in weights]
    return gradients([F.linear(x, weight.flatten(1)) for weight in plain], plain, x)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["neighbours", "apart"])
def test_layers_of_one_input(weights, order):
    x = torch.randn(2, 4, 6, requires_grad=True)
    chosen = [weights[number] for number in order]
    outputs = project(x, chosen)
    for output, weight in zip(outputs, chosen, strict=True):
        torch.testing.assert_close(output, F.linear(x, weight))
    torch.testing.assert_close(gradients(outputs, chosen, x), expected(chosen, x))


def test_a_1x1_convolution_in_channels_last(weights):
    weight = torch.nn.Parameter(torch.randn(5, 1, 1, 6).permute(0, 3, 1, 2))
    x = torch.randn(2, 3, 3, 6, requires_grad=True)
    found = gradients([linear.linear(x, weight)], [weight], x)
    assert found[1].stride() == weight.stride()
    x_grad, weight_grad = expected([weight], x)
    torch.testing.assert_close(found, [x_grad, weight_grad])


def test_gradients_are_written_where_they_are_to_lie(weights):
    x = torch.randn(2, 4, 6, requires_grad=True)
    places = list(torch.full((3, 5, 6), torch.nan))
    assert are_neighbours(places)
    for weight, place in zip(weights, places, strict=True):
        setattr(weight, GRAD_PLACE, place)
    found = gradients(project(x, weights), weights, x)
    torch.testing.assert_close(found, expected(weights, x))
    assert [weight.grad.data_ptr() for weight in weights] == [place.data_ptr() for place in places]


def test_a_second_backward_pass_adds_to_the_first(weights):
    inputs = list(torch.randn(2, 2, 4, 6))
    for weight, place in zip(weights, torch.zeros(3, 5, 6), strict=True):
        setattr(weight, GRAD_PLACE, place)
    sums = [torch.zeros(5, 6) for _ in weights]
    for x in inputs:
        found = gradients(project(x.requires_grad_(), weights), weights, x)
        sums = [total + grad for total, grad in zip(sums, expected(weights, x)[1:], strict=True)]
    torch.testing.assert_close(found[1:], sums)


def test_places_that_are_apart_are_not_written_to(weights):
    x = torch.randn(2, 4, 6, requires_grad=True)
    places = [torch.full((5, 6), torch.nan) for _ in weights]
    for weight, place in zip(weights, places, strict=True):
        setattr(weight, GRAD_PLACE, place)
    torch.testing.assert_close(gradients(project(x, weights), weights, x), expected(weights, x))
    assert all(place.isnan().all() for place in places)
