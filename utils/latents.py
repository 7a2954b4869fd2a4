"""Photos as latent distributions: each crop goes through the VAE once, however often it is drawn."""

from collections.abc import Collection

import torch

from utils.diffusion import encode_images
from utils.runtime.timing import mark

MAX_CACHED_BYTES = 1 << 30


class InstanceLatents:
    """Mean and standard deviation of the VAE's latent distribution for a photo's crop.

    A photo with a fixed crop (square, or --center_crop) is encoded before training starts; crops of the others when
    they are first drawn, and kept, up to MAX_CACHED_BYTES in all. Sampling anew from the kept distribution each step
    is exactly what encoding anew each step would give.

    Args:
        dataset: an InstanceDataset or a ClassDataset.
        vae: frozen; let go of where it is not needed again.
        photos: the only ones that will be drawn; None: all.
    """

    def __init__(self, dataset, vae: torch.nn.Module, photos: Collection[int] | None = None):
        self.dataset = dataset
        self.vae = vae
        self._moments: dict[tuple[int, int, int], torch.Tensor] = {}
        self._cached_bytes = 0
        self.shape = tuple(self.moments(0, (0.0, 0.0)).shape[1:])
        if dataset.has_fixed_crops:
            photos = range(len(dataset)) if photos is None else sorted(photos)
            for photo in photos:
                self.moments(photo, (0.0, 0.0))
            if len(self._moments) >= len({0, *photos}):
                self.vae = None
        mark("photos encoded")

    def moments(self, photo: int, position: tuple[float, float]) -> torch.Tensor:
        """float32 [2,4,h,w]: mean and standard deviation for the crop at `position`, two numbers in [0,1)."""
        key = (photo, *self.dataset.crop_origin(photo, position))
        if key in self._moments:
            return self._moments[key]
        weight = next(self.vae.parameters())
        pixel_values = self.dataset.pixel_values(*key).unsqueeze(0).to(weight.device, dtype=weight.dtype)
        moments = torch.cat(encode_images(self.vae, pixel_values))
        if self._cached_bytes + moments.nbytes <= MAX_CACHED_BYTES:
            self._moments[key] = moments
            self._cached_bytes += moments.nbytes
        return moments
