"""One optimisation step, as the method reads: noise, prediction, target, loss, update."""

import contextlib
from typing import Any

import torch
import torch.distributed as dist

from utils.data.batches import MicroBatch
from utils.data.inputs import TrainingInputs
from utils.diffusion import Loss, sample_latents, training_target
from utils.kernels.ahead_of_time import compile_ahead
from utils.runtime.colossal import sum_vectors
from utils.runtime.timing import mark
from utils.training.optimizer import MasterWeightsOptimizer

METRICS = ("loss", "lr", "grad_norm", "loss_scale", "skipped", "instance_loss", "class_loss")


def predict(
    unet: torch.nn.Module,
    inputs: TrainingInputs,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the UNet predicts of noisy latents, in its dtype, and what it should, float32: [B,4,h,w] each.

    Args:
        latents, noise: float32 [B,4,h,w].
        timesteps, prompt_rows: int64 [B]; rows are of inputs.encoder_hidden_states.
    """
    noisy_latents = inputs.noise_scheduler.add_noise(latents, noise, timesteps)
    encoder_hidden_states = inputs.encoder_hidden_states.index_select(0, prompt_rows)
    weight_dtype = encoder_hidden_states.dtype
    model_pred = unet(noisy_latents.to(weight_dtype), timesteps, encoder_hidden_states, return_dict=False)[0]
    return model_pred, training_target(inputs.noise_scheduler, latents, noise, timesteps)


class TrainStep:
    """The eager definition of a step: forward and backward of every micro-batch, then one update.

    Args:
        unet, optimizer, booster: as boosted.
        inputs: the prompts, the noise scheduler and the VAE's scaling factor.
    """

    def __init__(self, unet: Any, optimizer: MasterWeightsOptimizer, booster: Any, inputs: TrainingInputs, loss: Loss):
        self.unet, self.optimizer, self.booster = unet, optimizer, booster
        self.inputs, self.loss = inputs, loss
        self.num_ranks = dist.get_world_size()

    def __call__(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """Trains on the micro-batches; returns float64 [7] on the device: what METRICS names."""
        self.optimizer.zero_grad()
        shares, num_shares = [], len(micro_batches) * self.num_ranks
        for number, batch in enumerate(micro_batches, 1):
            reduces = self.num_ranks > 1 and number == len(micro_batches)  # the ranks' gradients, once a step
            with contextlib.nullcontext() if reduces else self.booster.no_sync(self.unet, self.optimizer):
                shares.append(self._forward_backward(batch, num_shares))
        losses = torch.stack(shares).sum(0)
        if self.num_ranks > 1:
            sum_vectors(self.unet)
            dist.all_reduce(losses)
        loss, instance_loss, class_loss = losses.unbind()
        update = self.optimizer.step()
        metrics = dict(loss=loss, instance_loss=instance_loss, class_loss=class_loss, **update)
        return torch.stack([metrics[name].double() for name in METRICS])

    def _forward_backward(self, batch: MicroBatch, num_shares: int) -> torch.Tensor:
        """Returns this micro-batch's share of the loss, the photos' loss and the class images' loss, [3].

        The step's loss is the mean over so many micro-batches, of all ranks: shares and gradients are to be summed.
        """
        inputs = self.inputs
        latents = sample_latents(batch.latent_mean, batch.latent_std, batch.latent_noise, inputs.scaling_factor)
        model_pred, target = predict(self.unet, inputs, latents, batch.noise, batch.timesteps, batch.prompt_rows)
        losses = self.loss(model_pred, target, batch.timesteps, batch.position_weights)
        self.booster.backward(losses[0] / num_shares, self.optimizer)
        return torch.stack(losses).detach() / num_shares

    def compile_kernels(self, micro_batches: list[MicroBatch]) -> str | None:
        """Compiles the step's kernels, lets the libraries choose theirs, and changes nothing; returns why not."""

        def without_a_trace() -> None:
            self.optimizer.zero_grad()
            with self.booster.no_sync(self.unet, self.optimizer):
                self._forward_backward(micro_batches[0], len(micro_batches))
            self.optimizer.update_nothing()

        reason = compile_ahead(without_a_trace)
        self.optimizer.zero_grad()
        mark("kernels compiled")
        return reason
