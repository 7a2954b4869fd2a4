"""One optimisation step: what is drawn for it, what is done with it, and the same captured in a CUDA graph."""

import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from utils.diffusion import denoising_loss, sample_latents, training_target
from utils.latents import InstanceLatents
from utils.randomness import draw_sample, sample_indices

METRICS = ("loss", "lr", "grad_norm", "loss_scale", "skipped")
WARM_UP_STEPS = 3  # eager steps before the capture: libraries choose algorithms, kernels are compiled
DDP_WARM_UP_STEPS = 12  # DistributedDataParallel rebuilds its buckets and takes times during its first eleven


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
        self.num_ranks = dist.get_world_size()

    def __call__(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """Trains on the micro-batches; returns float64 [5] on the device: what METRICS names."""
        self.optimizer.zero_grad()
        losses = []
        for number, micro_batch in enumerate(micro_batches, 1):
            reduces = self.num_ranks > 1 and number == len(micro_batches)
            with contextlib.nullcontext() if reduces else self.booster.no_sync(self.unet, self.optimizer):
                losses.append(self._forward_backward(micro_batch, len(micro_batches)))
        loss = torch.stack(losses).sum()
        if self.num_ranks > 1:
            dist.all_reduce(loss)
            loss /= self.num_ranks
        metrics = dict(loss=loss, **self.optimizer.step())
        return torch.stack([metrics[name].double() for name in METRICS])

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


class CapturedStep:
    """A TrainStep whose every operation is captured in one CUDA graph after a few eager steps, then replayed.

    The eager step is the definition: the graph runs the same kernels on the same buffers, only without the host
    launching each. Everything must run on one stream that is not the default one (see `training_stream`).

    Args:
        train_step: the eager step.
        say: told, in one line, why steps go on eagerly where the capture fails.
    """

    def __init__(self, train_step: TrainStep, say: Callable[[str], None]):
        self.train_step = train_step
        self.say = say
        self._num_eager = WARM_UP_STEPS if train_step.num_ranks == 1 else DDP_WARM_UP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[MicroBatch] = []
        self._metrics: torch.Tensor | None = None

    def __call__(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """As TrainStep's; the result is overwritten by the next call."""
        if self._num_eager > 0:
            self._num_eager -= 1
            return self.train_step(micro_batches)
        if self._graph is None:
            try:
                self._capture(micro_batches)
            except RuntimeError as error:
                self._num_eager, self._graph = sys.maxsize, None
                self.say(f"the step could not be captured in a CUDA graph, so it runs eagerly: {first_line(error)}")
                return self.train_step(micro_batches)
        for static, fresh in zip(self._inputs, micro_batches, strict=True):
            for target, source in zip(static, fresh, strict=True):
                target.copy_(source, non_blocking=True)
        self._graph.replay()
        return self._metrics

    def _capture(self, micro_batches: list[MicroBatch]) -> None:
        self._inputs = [MicroBatch(*(value.clone() for value in batch)) for batch in micro_batches]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._metrics = self.train_step(self._inputs)
        if self.train_step.optimizer.flat.grad_table is not None:
            self.train_step.optimizer.flat.bind_grads()
        self._graph = graph


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def training_stream(device: torch.device):
    """A context in which all GPU work, ColossalAI's boosting included, goes to one stream that can be captured."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
