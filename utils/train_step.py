"""One optimisation step: what is drawn for it, what is done with it, and the same captured in a CUDA graph."""

import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from utils.diffusion import denoising_loss, sample_latents, training_target
from utils.inputs import TrainingInputs
from utils.randomness import CLASS, INSTANCE, draw_sample, sample_indices
from utils.rehearsal import rehearse
from utils.timing import mark

METRICS = ("loss", "lr", "grad_norm", "loss_scale", "skipped", "instance_loss", "class_loss")
WARM_UP_STEPS = 3  # eager steps before the capture: libraries choose algorithms, kernels are compiled
DDP_WARM_UP_STEPS = 12  # DistributedDataParallel rebuilds its buckets and takes times during its first eleven


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


class TrainStep:
    """The eager definition of a step: forward and backward of every micro-batch, then one update.

    Args:
        unet, optimizer, booster: as boosted; the optimizer is a MasterWeightsOptimizer.
        inputs: the prompts, the noise scheduler, the timesteps' weights and the VAE's scaling factor.
        prior_loss_weight: of the class images' loss, where there are any.
    """

    def __init__(
        self,
        *,
        unet: torch.nn.Module,
        optimizer,
        booster,
        inputs: TrainingInputs,
        prior_loss_weight: float = 1.0,
    ):
        self.unet = unet
        self.optimizer = optimizer
        self.booster = booster
        self.inputs = inputs
        self.prior_loss_weight = prior_loss_weight
        self.num_ranks = dist.get_world_size()

    def __call__(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """Trains on the micro-batches; returns float64 [7] on the device: what METRICS names."""
        self.optimizer.zero_grad()
        losses = []
        for number, micro_batch in enumerate(micro_batches, 1):
            reduces = self.num_ranks > 1 and number == len(micro_batches)
            with contextlib.nullcontext() if reduces else self.booster.no_sync(self.unet, self.optimizer):
                losses.append(self._forward_backward(micro_batch, len(micro_batches)))
        losses = torch.stack(losses).sum(0)
        if self.num_ranks > 1:
            dist.all_reduce(losses)
            losses /= self.num_ranks
        names = ("loss", "instance_loss", "class_loss")
        metrics = dict(zip(names, losses.unbind(), strict=True), **self.optimizer.step())
        return torch.stack([metrics[name].double() for name in METRICS])

    def rehearse(self, micro_batches: list[MicroBatch]) -> str | None:
        """Compiles the step's kernels (see utils.rehearsal), lets the libraries choose theirs, and changes nothing."""

        def without_a_trace():
            self.optimizer.zero_grad()
            with self.booster.no_sync(self.unet, self.optimizer):
                self._forward_backward(micro_batches[0], len(micro_batches))
            self.optimizer.rehearse()

        reason = rehearse(without_a_trace)
        self.optimizer.zero_grad()
        mark("kernels compiled")
        return reason

    def _forward_backward(self, batch: MicroBatch, num_micro_batches: int) -> torch.Tensor:
        """Returns this micro-batch's share of the loss, the photos' loss and the class images' loss, [3]."""
        noise_scheduler, prompts = self.inputs.noise_scheduler, self.inputs.encoder_hidden_states
        latents = sample_latents(batch.latent_mean, batch.latent_std, batch.latent_noise, self.inputs.scaling_factor)
        noisy_latents = noise_scheduler.add_noise(latents, batch.noise, batch.timesteps).to(prompts.dtype)
        encoder_hidden_states = prompts.index_select(0, batch.prompts)
        model_pred = self.unet(noisy_latents, batch.timesteps, encoder_hidden_states, return_dict=False)[0]
        target = training_target(noise_scheduler, latents, batch.noise, batch.timesteps)
        instance_loss, class_loss = self._losses(model_pred, target, batch.timesteps)
        loss = instance_loss if class_loss is None else instance_loss + self.prior_loss_weight * class_loss
        self.booster.backward(loss / num_micro_batches, self.optimizer)
        class_loss = torch.zeros_like(loss) if class_loss is None else class_loss
        return torch.stack([loss, instance_loss, class_loss]).detach() / num_micro_batches

    def _losses(self, model_pred: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> tuple:
        """The photos' loss and the class images', or None; weights are applied to samples before either's mean."""
        weights = self.inputs.timestep_weights
        if weights is not None:
            weights = weights.index_select(0, timesteps)
        if self.inputs.class_latents is None:
            return denoising_loss(model_pred, target, weights), None
        weight_halves = (None, None) if weights is None else weights.chunk(2)
        halves = zip(model_pred.chunk(2), target.chunk(2), weight_halves, strict=True)
        instance_loss, class_loss = (denoising_loss(*half) for half in halves)
        return instance_loss, class_loss


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
