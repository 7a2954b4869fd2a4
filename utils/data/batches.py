"""What is drawn for a step: its micro-batches."""

from typing import NamedTuple

import numpy as np
import torch

from utils.data.inputs import TrainingInputs
from utils.data.randomness import CLASS, INSTANCE, draw_sample, sample_indices


class MicroBatch(NamedTuple):
    """What one forward pass needs: float32 [B,4,h,w] each, but `timesteps` and `prompts` int64 [B].

    With prior preservation the first half are photos, the second class images. `prompts` are rows of the table of
    prompts.
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    latent_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompts: torch.Tensor


class BatchSource:
    """The micro-batches of any step of a run, for one rank; holds no state that a step changes."""

    def __init__(
        self,
        inputs: TrainingInputs,
        *,
        seed: int,
        rank: int,
        num_ranks: int,
        batch_size: int,
        num_micro_batches: int,
        noise_offset: float = 0.0,
        device,
    ):
        self.inputs = inputs
        self.streams = [(inputs.latents, INSTANCE)]
        if inputs.class_latents is not None:
            self.streams.append((inputs.class_latents, CLASS))
        self.noise_offset = noise_offset
        self.seed = seed
        self.rank = rank
        self.spread = dict(num_micro_batches=num_micro_batches, num_ranks=num_ranks, batch_size=batch_size)
        self.device = device

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of global step `step` (from 0) of this rank."""
        return [self._micro_batch(step, number) for number in range(self.spread["num_micro_batches"])]

    def _micro_batch(self, step: int, number: int) -> MicroBatch:
        indices = sample_indices(step, number, self.rank, **self.spread)
        samples, moments, prompts = [], [], []
        for latents, stream in self.streams:
            draw = dict(num_photos=len(latents.dataset), latent_shape=latents.shape, noise_offset=self.noise_offset)
            draw |= dict(num_train_timesteps=self.inputs.num_train_timesteps, stream=stream)
            drawn = [draw_sample(self.seed, index, **draw) for index in indices]
            moments += [latents.moments(sample.photo, sample.crop) for sample in drawn]
            prompts += [self.inputs.prompt_numbers[latents.dataset.prompt(sample.photo)] for sample in drawn]
            samples += drawn
        moments = torch.stack(moments)
        noise = torch.from_numpy(np.stack([(sample.latent_noise, sample.noise) for sample in samples], axis=1))
        integers = torch.tensor([[sample.timestep for sample in samples], prompts])
        if self.device.type == "cuda":
            noise, integers = noise.pin_memory(), integers.pin_memory()
        latent_noise, noise = noise.to(self.device, non_blocking=True)
        timesteps, prompts = integers.to(self.device, non_blocking=True)
        return MicroBatch(moments[:, 0], moments[:, 1], latent_noise, noise, timesteps, prompts)
