"""Each crop goes through the VAE once; what is kept is what encoding anew would give."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.pipelines import write_photos
from utils.data.inputs import InstanceLatents
from utils.dataset import InstanceDataset
from utils.diffusion import encode_images
from utils.models.folder import read_base
from utils.models.loading import load_frozen


class CountingVAE(torch.nn.Module):
    """A VAE whose latent distribution is a plain function of its input, and that counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = []

    def encode(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        assert pixel_values.dtype == self.weight.dtype and not torch.is_grad_enabled()
        self.calls.append(pixel_values.clone())
        mean = torch.nn.functional.avg_pool2d(pixel_values, 2)[:, [0, 1, 2, 0]]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.abs() + 0.5))


@pytest.fixture
def square(photos_dir) -> InstanceDataset:
    return InstanceDataset(photos_dir, 16)


@pytest.fixture
def wide(tmp_path) -> InstanceDataset:
    """Two photos of 24 x 16: nine crops each."""
    return InstanceDataset(write_photos(tmp_path, 2, size=(24, 16)), 16)


def test_a_square_photo_is_encoded_once_and_the_vae_freed(square):
    vae = CountingVAE()
    latents = InstanceLatents(square, vae, {"": 0})
    assert len(vae.calls) == 4 and latents.vae is None
    for photo in (0, 3, 3, 1):
        latents.moments(photo, (0.3, 0.9))
    assert len(vae.calls) == 4
    assert latents.shape == (4, 8, 8)


def test_a_centred_crop_is_encoded_once_and_the_vae_freed(tmp_path):
    vae = CountingVAE()
    dataset = InstanceDataset(write_photos(tmp_path, 2, size=(24, 16)), 16, center_crop=True)
    latents = InstanceLatents(dataset, vae, {"": 0})
    assert len(vae.calls) == 2 and latents.vae is None
    torch.testing.assert_close(vae.calls[1][0], dataset.pixel_values(1, 0, 4))
    assert torch.equal(latents.moments(1, (0.0, 0.0)), latents.moments(1, (0.9, 0.9)))


def test_a_random_crop_is_encoded_when_first_drawn_and_kept(wide):
    vae = CountingVAE()
    latents = InstanceLatents(wide, vae, {"": 0})
    assert latents.vae is vae
    latents.moments(1, (0.0, 0.5))
    num_calls = len(vae.calls)
    latents.moments(1, (0.9, 0.5))  # the same place: there is no vertical room
    assert len(vae.calls) == num_calls
    torch.testing.assert_close(vae.calls[-1][0], wide.pixel_values(1, 0, 4))
    latents.moments(1, (0.0, 0.9))
    latents.moments(0, (0.0, 0.9))
    assert len(vae.calls) == num_calls + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_equals_a_fresh_encoding(square, tiny_pipeline_dir, dtype):
    vae = load_frozen(read_base(tiny_pipeline_dir), "vae", dtype, "cpu")
    latents = InstanceLatents(square, vae, {"": 0})
    for photo in range(len(square)):
        mean, std = encode_images(vae, square.pixel_values(photo, 0, 0)[None].to(dtype))
        moments = latents.moments(photo, (0.5, 0.5))
        assert moments.dtype == torch.float32 and not moments.requires_grad
        assert torch.equal(moments, torch.cat([mean, std]))
    assert (moments[1] > 0).all()


def test_a_full_cache_encodes_anew_and_gives_the_same(wide, monkeypatch):
    free = InstanceLatents(wide, CountingVAE(), {"": 0})
    monkeypatch.setattr("utils.data.inputs.MAX_CACHED_BYTES", free.moments(0, (0.0, 0.0)).nbytes * 2 + 1)
    vae = CountingVAE()
    latents = InstanceLatents(wide, vae, {"": 0})
    places = [(photo, (0.0, x)) for photo in (0, 1) for x in (0.0, 0.4, 0.9)] * 2
    for place in places:
        assert torch.equal(latents.moments(*place), free.moments(*place))
    # Two distributions are kept; each of the four other crops was encoded in both rounds.
    assert len(vae.calls) == 2 + 4 * 2


def test_fixed_crops_that_do_not_fit_into_the_cache_keep_the_vae(square, monkeypatch):
    free = InstanceLatents(square, CountingVAE(), {"": 0})
    monkeypatch.setattr("utils.data.inputs.MAX_CACHED_BYTES", free.moments(0, (0.0, 0.0)).nbytes * 2)
    latents = InstanceLatents(square, CountingVAE(), {"": 0})
    for photo in range(4):
        assert torch.equal(latents.moments(photo, (0.0, 0.0)), free.moments(photo, (0.0, 0.0)))
