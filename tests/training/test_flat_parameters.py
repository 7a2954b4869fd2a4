"""Parameters, gradients and masters in flat buffers."""

import pytest
import torch

from tests.helpers.modules import make_module
from utils.training.flat_parameters import FlatParameters


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_parameters_and_gradients_are_views_of_the_flat_buffers(memory_format):
    """And the masters are the file's values, not their rounded cast."""
    module = make_module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    flat = FlatParameters(module, torch.float16, "cpu", memory_format)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name].half())
        assert torch.equal(dict(flat.named_masters())[name], before[name])
    assert module[0].weight.is_contiguous(memory_format=memory_format)
    flat.weight.zero_()
    module.half()(torch.randn(2, 3, 6, 6).half()).sum().backward()
    assert all((p == 0).all() for p in module.parameters())
    assert flat.grad.abs().sum() > 0
