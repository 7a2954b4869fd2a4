"""The method itself as pure tensor functions: photo -> latents -> noisy latents -> target -> loss."""

from typing import Any

import torch
import torch.nn.functional as F


@torch.no_grad()
def encode_images(vae: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the VAE's latent distribution, float32 [B,4,R/8,R/8] each.

    `pixel_values` is [B,3,R,R] in [-1,1] in the VAE's dtype; the scaling factor is not applied.
    """
    latent_dist = vae.encode(pixel_values).latent_dist
    return latent_dist.mean.float(), latent_dist.std.float()


@torch.no_grad()
def encode_prompt(text_encoder: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """`encoder_hidden_states` [B,77,C] of `input_ids` [B,77], in the text encoder's dtype."""
    return text_encoder(input_ids)[0]


def sample_latents(
    mean: torch.Tensor, std: torch.Tensor, latent_noise: torch.Tensor, scaling_factor: float
) -> torch.Tensor:
    """Scaled latents from N(mean, std^2), all [B,4,h,w] float32 (Kingma & Welling 2014; scaling: Rombach 2022)."""
    return (mean + std * latent_noise) * scaling_factor


def training_target(
    noise_scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet has to predict: the noise, or the velocity (Salimans & Ho 2022); ValueError for any other type."""
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"the scheduler's prediction_type is {prediction_type!r}, not 'epsilon' or 'v_prediction'")


def min_snr_weights(noise_scheduler: Any, snr_gamma: float) -> torch.Tensor:
    """The loss weight of every timestep, float32 [num_train_timesteps] (Hang et al. 2023, arXiv 2303.09556).

    min(SNR, gamma) is the weight of the squared error of the clean latents; an error of the noise is SNR times that,
    an error of the velocity SNR + 1 times.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.double()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return (snr.clamp(max=snr_gamma) / (snr + 1)).float()
    return (snr_gamma / snr).clamp(max=1).float()


class Loss:
    """How far what the UNet predicts is from what it should: one object for training and validation.

    Args:
        noise_scheduler: diffusers' DDPMScheduler.
        snr_gamma: of min-SNR weights of the timesteps; None: all count alike.
        prior_loss_weight: of the class images, which are the second half of every batch; None: there are none.
    """

    def __init__(
        self,
        noise_scheduler: Any,
        device: torch.device | str,
        *,
        snr_gamma: float | None = None,
        prior_loss_weight: float | None = None,
    ):
        self.timestep_weights = min_snr_weights(noise_scheduler, snr_gamma).to(device) if snr_gamma else None
        self.prior_loss_weight = prior_loss_weight

    def __call__(
        self, model_pred: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a batch is trained on, the photos' loss in it, and the class images' (0 without any), a mean each."""
        weights = None if self.timestep_weights is None else self.timestep_weights.index_select(0, timesteps)
        if self.prior_loss_weight is None:
            loss = self.mean(model_pred, target, weights)
            return loss, loss, torch.zeros_like(loss)
        instance_weights, class_weights = (None, None) if weights is None else weights.chunk(2)
        (instance_pred, class_pred), (instance_target, class_target) = model_pred.chunk(2), target.chunk(2)
        instance_loss = self.mean(instance_pred, instance_target, instance_weights)
        class_loss = self.mean(class_pred, class_target, class_weights)
        return instance_loss + self.prior_loss_weight * class_loss, instance_loss, class_loss

    def mean(
        self, model_pred: torch.Tensor, target: torch.Tensor, sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mean over samples, a scalar; validation's loss, where all timesteps count alike.

        Args:
            model_pred, target: [B,4,h,w].
            sample_weights: [B]; each sample's error is multiplied by its own before the mean over samples.
        """
        if sample_weights is None:
            return self.errors(model_pred, target, "mean")
        errors = self.errors(model_pred, target, "none").flatten(1).mean(1)
        return (errors * sample_weights).mean()

    def errors(self, model_pred: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        """The kind of loss: squared errors in float32 (Ho et al. 2020, eq. 14), or ("mean") their mean."""
        return F.mse_loss(model_pred.float(), target.float(), reduction=reduction)
