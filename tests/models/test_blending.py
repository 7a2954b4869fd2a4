"""Blended weights: both ends to the bit, the line between and beyond, and modules that keep their storages."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tests.helpers.pipelines import UNET_CONFIG, write_pipeline
from tests.helpers.script import UNET_FILE
from utils.errors import UserError
from utils.models.blending import blend, blended_weights, load_weights
from utils.models.check import check_same_unet
from utils.models.folder import read_base
from utils.models.loading import load_unet


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """A base and what it became: two models of one architecture."""
    root = tmp_path_factory.mktemp("ends")
    return [write_pipeline(root / str(seed), seed) for seed in (0, 1)]


def test_both_ends_are_there_to_the_bit(ends):
    base, tuned = (load_file(folder / UNET_FILE) for folder in ends)
    base["conv_in.bias"][:2] = torch.tensor([-0.0, 1e30])
    for strength, expected in ((0, base), (1, tuned), (0.0, base), (1.0, tuned)):
        for name in base:
            assert blend(base[name], tuned[name], strength).numpy().tobytes() == expected[name].numpy().tobytes()


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.5, 3])
def test_between_and_beyond_it_is_the_line(ends, strength):
    base, tuned = (load_file(folder / UNET_FILE) for folder in ends)
    for name, value in blended_weights(*ends, strength):
        exact = base[name].double() + strength * (tuned[name].double() - base[name].double())
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


def test_it_is_computed_in_fp32_and_has_the_dtype_of_the_tuned_file():
    base, tuned = torch.tensor([1.0]), torch.tensor([1.001], dtype=torch.float16)
    expected = (1 + 0.9 * (tuned.float() - 1)).half()
    assert blend(base, tuned, 0.9).dtype == torch.float16
    assert torch.equal(blend(base, tuned, 0.9), expected)
    assert torch.equal(blend(base, tuned, 0), base.half())


def test_at_full_strength_the_base_is_not_read(ends, tmp_path):
    tuned = load_file(ends[1] / UNET_FILE)
    assert all(torch.equal(value, tuned[name]) for name, value in blended_weights(tmp_path / "gone", ends[1], 1))


def test_unets_of_two_architectures_are_refused(ends, tmp_path):
    other = write_pipeline(tmp_path / "other")
    UNet2DConditionModel(**UNET_CONFIG | dict(cross_attention_dim=64)).save_pretrained(other / "unet")
    for check in (lambda: check_same_unet(ends[0], other), lambda: list(blended_weights(ends[0], other, 0.5))):
        with pytest.raises(UserError, match="not of one architecture"):
            check()
    check_same_unet(*ends)


def test_weights_change_where_they_lie(ends):
    unet = load_unet(read_base(ends[0]))
    places = {name: parameter.data_ptr() for name, parameter in unet.named_parameters()}
    load_weights(unet, blended_weights(*ends, 1))
    assert {name: parameter.data_ptr() for name, parameter in unet.named_parameters()} == places
    unet.half()
    places = {name: parameter.data_ptr() for name, parameter in unet.named_parameters()}
    load_weights(unet, blended_weights(*ends, 0.5))
    assert {name: parameter.data_ptr() for name, parameter in unet.named_parameters()} == places
    expected = dict(blended_weights(*ends, 0.5))
    assert all(torch.equal(value, expected[name].half()) for name, value in unet.state_dict().items())
    with pytest.raises(KeyError):
        load_weights(unet, list(expected.items())[1:])
