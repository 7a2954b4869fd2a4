"""What is drawn for a step: its micro-batches."""

from typing import NamedTuple

import numpy as np
import torch

from utils.data.inputs import InstanceLatents, TrainingInputs
from utils.data.randomness import CLASS, INSTANCE, Sample, Stream, draw_sample, sample_indices


class MicroBatch(NamedTuple):
    """What one forward pass needs: float32 [B,4,h,w] each, but `timesteps` and `prompt_rows` int64 [B].

    With prior preservation the first half are photos, the second class images. `prompt_rows` are rows of
    TrainingInputs.encoder_hidden_states. `position_weights` float32 [B,1,h,w] are of the photos alone; None without
    --alpha_mask.
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    latent_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompt_rows: torch.Tensor
    position_weights: torch.Tensor | None = None

    def clone(self) -> "MicroBatch":
        """The same values in memory of their own."""
        return self._replace(**{name: each.clone() for name, each in self._asdict().items() if each is not None})


class BatchSource:
    """The micro-batches of any step of a run, for one rank; holds no state that a step changes.

    Args:
        inputs: the photos' and class images' latents and prompts.
        rank, num_ranks, batch_size, num_micro_batches: how a step's samples are spread; their order does not change.
        noise_offset: see randomness.draw_sample.
        device: where the micro-batches go.
    """

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
        device: torch.device,
    ):
        self.streams = [(inputs.latents, INSTANCE)]
        if inputs.class_latents is not None:
            self.streams.append((inputs.class_latents, CLASS))
        self.num_train_timesteps = inputs.num_train_timesteps
        self.noise_offset = noise_offset
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.batch_size = batch_size
        self.num_micro_batches = num_micro_batches
        self.device = device

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of global step `step` (from 0) of this rank."""
        return [self._micro_batch(step, number) for number in range(self.num_micro_batches)]

    def _micro_batch(self, step: int, number: int) -> MicroBatch:
        indices = sample_indices(
            step,
            number,
            self.rank,
            num_micro_batches=self.num_micro_batches,
            num_ranks=self.num_ranks,
            batch_size=self.batch_size,
        )
        samples: list[Sample] = []
        moments: list[torch.Tensor] = []
        prompt_rows: list[int] = []
        position_weights: list[torch.Tensor] = []
        for latents, stream in self.streams:
            drawn = [self._draw(index, latents, stream) for index in indices]
            moments += [latents.moments(sample.photo, sample.crop) for sample in drawn]
            prompt_rows += [latents.prompt_rows[sample.photo] for sample in drawn]
            samples += drawn
            if latents.has_position_weights:
                position_weights += [latents.position_weights(sample.photo, sample.crop) for sample in drawn]
        mean, std = torch.stack(moments, dim=1)
        noise = torch.from_numpy(np.stack([(sample.latent_noise, sample.noise) for sample in samples], axis=1))
        integers = torch.tensor([[sample.timestep for sample in samples], prompt_rows])
        if self.device.type == "cuda":
            noise, integers = noise.pin_memory(), integers.pin_memory()
        latent_noise, noise = noise.to(self.device, non_blocking=True)
        timesteps, rows = integers.to(self.device, non_blocking=True)
        weights = torch.stack(position_weights) if position_weights else None
        return MicroBatch(mean, std, latent_noise, noise, timesteps, rows, weights)

    def _draw(self, index: int, latents: InstanceLatents, stream: Stream) -> Sample:
        return draw_sample(
            self.seed,
            index,
            num_photos=len(latents),
            latent_shape=latents.shape,
            num_train_timesteps=self.num_train_timesteps,
            noise_offset=self.noise_offset,
            stream=stream,
        )
