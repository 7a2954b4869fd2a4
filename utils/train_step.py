"""One optimisation step: what is drawn for it, and what is done with it."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from utils.diffusion import denoising_loss, sample_latents, training_target
from utils.latents import InstanceLatents
from utils.randomness import draw_sample, sample_indices


class MicroBatch(NamedTuple):
    """What one forward pass needs: float32 [B,4,h,w] each, but `timesteps` int64 [B]."""

    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    latent_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


class BatchSource:
    """The micro-batches of any step of a run, for one rank; holds no state that a step changes."""

    def __init__(
        self,
        latents: InstanceLatents,
        *,
        seed: int,
        rank: int,
        num_ranks: int,
        batch_size: int,
        num_micro_batches: int,
        num_train_timesteps: int,
        device,
    ):
        self.latents = latents
        self.seed = seed
        self.rank = rank
        self.spread = dict(num_micro_batches=num_micro_batches, num_ranks=num_ranks, batch_size=batch_size)
        self.num_train_timesteps = num_train_timesteps
        self.device = device

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of global step `step` (from 0) of this rank."""
        return [self._micro_batch(step, number) for number in range(self.spread["num_micro_batches"])]

    def _micro_batch(self, step: int, number: int) -> MicroBatch:
        indices = sample_indices(step, number, self.rank, **self.spread)
        draw = dict(
            num_photos=len(self.latents.dataset),
            latent_shape=self.latents.shape,
            num_train_timesteps=self.num_train_timesteps,
        )
        samples = [draw_sample(self.seed, index, **draw) for index in indices]
        moments = torch.stack([self.latents.moments(sample.photo, sample.crop) for sample in samples])
        noise = torch.from_numpy(np.stack([(sample.latent_noise, sample.noise) for sample in samples], axis=1))
        timesteps = torch.tensor([sample.timestep for sample in samples])
        if self.device.type == "cuda":
            noise, timesteps = noise.pin_memory(), timesteps.pin_memory()
        latent_noise, noise = noise.to(self.device, non_blocking=True)
        timesteps = timesteps.to(self.device, non_blocking=True)
        return MicroBatch(moments[:, 0], moments[:, 1], latent_noise, noise, timesteps)


class TrainStep:
    """The eager definition of a step: forward and backward of every micro-batch, then one update.

    Args:
        unet, optimizer, booster: as boosted; the optimizer is a MasterWeightsOptimizer.
        noise_scheduler: DDPMScheduler of the base pipeline.
        encoder_hidden_states: the instance prompt's, [1,77,C].
        scaling_factor: the VAE's.
    """

    def __init__(
        self,
        *,
        unet: torch.nn.Module,
        optimizer,
        booster,
        noise_scheduler,
        encoder_hidden_states: torch.Tensor,
        scaling_factor: float,
    ):
        self.unet = unet
        self.optimizer = optimizer
        self.booster = booster
        self.noise_scheduler = noise_scheduler
        self.encoder_hidden_states = encoder_hidden_states
        self.scaling_factor = scaling_factor

    def __call__(self, micro_batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
        """Trains on the micro-batches; returns scalars on the device: `loss` and what the optimizer's step reports."""
        self.optimizer.zero_grad()
        losses = []
        for micro_batch in micro_batches[:-1]:
            with self.booster.no_sync(self.unet, self.optimizer):
                losses.append(self._forward_backward(micro_batch, len(micro_batches)))
        losses.append(self._forward_backward(micro_batches[-1], len(micro_batches)))
        loss = torch.stack(losses).sum()
        if dist.get_world_size() > 1:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return dict(loss=loss, **self.optimizer.step())

    def _forward_backward(self, batch: MicroBatch, num_micro_batches: int) -> torch.Tensor:
        weight_dtype = self.encoder_hidden_states.dtype
        latents = sample_latents(batch.latent_mean, batch.latent_std, batch.latent_noise, self.scaling_factor)
        noisy_latents = self.noise_scheduler.add_noise(latents, batch.noise, batch.timesteps).to(weight_dtype)
        encoder_hidden_states = self.encoder_hidden_states.expand(len(latents), -1, -1)
        model_pred = self.unet(noisy_latents, batch.timesteps, encoder_hidden_states, return_dict=False)[0]
        target = training_target(self.noise_scheduler, latents, batch.noise, batch.timesteps)
        loss = denoising_loss(model_pred, target) / num_micro_batches
        self.booster.backward(loss, self.optimizer)
        return loss.detach()
