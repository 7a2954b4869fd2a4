"""One optimisation step: what is drawn for it, what is done with it, and the same captured in a CUDA graph."""

import contextlib

import torch
import torch.distributed as dist

from utils.data.batches import MicroBatch
from utils.data.inputs import TrainingInputs
from utils.diffusion import denoising_loss, sample_latents, training_target
from utils.kernels.ahead_of_time import compile_ahead
from utils.runtime.timing import mark

METRICS = ("loss", "lr", "grad_norm", "loss_scale", "skipped", "instance_loss", "class_loss")


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
        """Compiles the step's kernels, lets the libraries choose theirs, and changes nothing; returns why not."""

        def without_a_trace():
            self.optimizer.zero_grad()
            with self.booster.no_sync(self.unet, self.optimizer):
                self._forward_backward(micro_batches[0], len(micro_batches))
            self.optimizer.rehearse()

        reason = compile_ahead(without_a_trace)
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
