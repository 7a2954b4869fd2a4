"""Every random draw of a run as a function of (seed, index, purpose); no generator state lives between calls.

The generator is numpy's Philox, a counter-based one (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): seed and purpose form its key, the index the upper words of its counter, so streams never overlap, and the
draws depend neither on the device nor on the version of torch.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the definition of a run: never reuse or renumber them."""

    PHOTO = 1
    CROP = 2
    LATENT_NOISE = 3
    NOISE = 4
    TIMESTEP = 5
    CLASS_IMAGE = 6
    CLASS_CROP = 7
    CLASS_LATENT_NOISE = 8
    CLASS_NOISE = 9
    CLASS_TIMESTEP = 10
    NOISE_OFFSET = 11
    CLASS_NOISE_OFFSET = 12
    CLASS_SEED = 13
    VALIDATION_PHOTO = 14
    VALIDATION_CROP = 15
    VALIDATION_LATENT_NOISE = 16
    VALIDATION_NOISE = 17
    VALIDATION_TIMESTEP = 18
    VALIDATION_NOISE_OFFSET = 19


class Stream(NamedTuple):
    """The purposes of one kind of training samples, so that the draws of photos and class images are independent."""

    photo: Purpose
    crop: Purpose
    latent_noise: Purpose
    noise: Purpose
    timestep: Purpose
    noise_offset: Purpose


INSTANCE = Stream(
    Purpose.PHOTO, Purpose.CROP, Purpose.LATENT_NOISE, Purpose.NOISE, Purpose.TIMESTEP, Purpose.NOISE_OFFSET
)
CLASS = Stream(
    Purpose.CLASS_IMAGE,
    Purpose.CLASS_CROP,
    Purpose.CLASS_LATENT_NOISE,
    Purpose.CLASS_NOISE,
    Purpose.CLASS_TIMESTEP,
    Purpose.CLASS_NOISE_OFFSET,
)
VALIDATION = Stream(
    Purpose.VALIDATION_PHOTO,
    Purpose.VALIDATION_CROP,
    Purpose.VALIDATION_LATENT_NOISE,
    Purpose.VALIDATION_NOISE,
    Purpose.VALIDATION_TIMESTEP,
    Purpose.VALIDATION_NOISE_OFFSET,
)


class Sample(NamedTuple):
    """One training sample's draws."""

    photo: int
    crop: tuple[float, float]
    latent_noise: np.ndarray
    noise: np.ndarray
    timestep: int


def generator(seed: int, index: int, purpose: Purpose) -> np.random.Generator:
    """A fresh generator for one (seed, index, purpose); seed and index are non-negative and below 2**64."""
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def photo_index(seed: int, index: int, num_photos: int, purpose: Purpose = Purpose.PHOTO) -> int:
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
    """All draws of global sample `index` of one stream, INSTANCE or CLASS.

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
    """Global sample indices of one rank's micro-batch: a range of the run's one stream (docs/decisions.md).

    However the product num_micro_batches x num_ranks x batch_size is factored, one step covers the same samples.
    """
    first = ((step * num_micro_batches + micro_batch) * num_ranks + rank) * batch_size
    return range(first, first + batch_size)
