"""Every random draw of a run as a function of (seed, index, purpose); no generator state lives between calls.

The generator is numpy's Philox, a counter-based one (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): seed and purpose form its key, the index the upper words of its counter, so streams never overlap, and the
draws depend neither on the device nor on the version of torch.
"""

from typing import NamedTuple

import numpy as np


class Stream(NamedTuple):
    """The purposes of one kind of samples, so that the draws of photos and of class images are independent.

    The numbers are part of the definition of a run: never reuse or renumber them.
    """

    photo: int
    crop: int
    latent_noise: int
    noise: int
    timestep: int
    noise_offset: int


INSTANCE = Stream(photo=1, crop=2, latent_noise=3, noise=4, timestep=5, noise_offset=11)
CLASS = Stream(photo=6, crop=7, latent_noise=8, noise=9, timestep=10, noise_offset=12)
CLASS_SEED = 13
VALIDATION = Stream(photo=14, crop=15, latent_noise=16, noise=17, timestep=18, noise_offset=19)


class Sample(NamedTuple):
    """One training sample's draws."""

    photo: int
    crop: tuple[float, float]
    latent_noise: np.ndarray
    noise: np.ndarray
    timestep: int


def generator(seed: int, index: int, purpose: int) -> np.random.Generator:
    """A fresh generator for one (seed, index, purpose); seed and index are non-negative and below 2**64."""
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def photo_index(seed: int, index: int, num_photos: int, purpose: int = INSTANCE.photo) -> int:
    """The photo of sample `index`: every epoch of num_photos samples shows each photo once, in an order of its own."""
    epoch, position = divmod(index, num_photos)
    return int(generator(seed, epoch, purpose).permutation(num_photos)[position])


def draw_sample(
    seed: int,
    index: int,
    *,
    num_photos: int,
    latent_shape: tuple[int, int, int],
    num_train_timesteps: int,
    noise_offset: float = 0.0,
    stream: Stream = INSTANCE,
) -> Sample:
    """All draws of global sample `index` of one stream.

    Returns a Sample: `photo` in [0, num_photos); `crop` (vertical, horizontal) positions in [0, 1);
    `latent_noise` and `noise` standard normal float32 of latent_shape [C, h, w], the latter plus noise_offset times
    one standard normal number per channel; `timestep` in [0, num_train_timesteps).
    """
    crop = generator(seed, index, stream.crop).random(2)
    noise = generator(seed, index, stream.noise).standard_normal(latent_shape, dtype=np.float32)
    if noise_offset:
        shift = generator(seed, index, stream.noise_offset).standard_normal((latent_shape[0], 1, 1), dtype=np.float32)
        noise += np.float32(noise_offset) * shift
    return Sample(
        photo=photo_index(seed, index, num_photos, stream.photo),
        crop=(float(crop[0]), float(crop[1])),
        latent_noise=generator(seed, index, stream.latent_noise).standard_normal(latent_shape, dtype=np.float32),
        noise=noise,
        timestep=int(generator(seed, index, stream.timestep).integers(num_train_timesteps)),
    )


def sample_indices(
    step: int, micro_batch: int, rank: int, *, num_micro_batches: int, num_ranks: int, batch_size: int
) -> range:
    """Global sample indices of one rank's micro-batch; however a step is factored, it covers the same samples."""
    first = ((step * num_micro_batches + micro_batch) * num_ranks + rank) * batch_size
    return range(first, first + batch_size)
