"""The method itself as pure tensor functions: photo -> latents -> noisy latents -> target -> loss."""

from typing import Any

import torch
import torch.nn.functional as F

SMALLEST_WEIGHT = 1e-6  # below that of one position, of which a pixel in 64 is 1/255 opaque


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
    """What the UNet has to predict, by the prediction_type: the noise, or the velocity (Salimans & Ho 2022).

    Raises ValueError for any other prediction_type.
    """
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


def denoising_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    sample_weights: torch.Tensor | None = None,
    position_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error in float32, a scalar (Ho et al. 2020, eq. 14).

    Args:
        model_pred, target: [B,4,h,w].
        sample_weights: [B]; each sample's error is multiplied by its own before the mean over samples.
        position_weights: [B,1,h,w] or [1,1,h,w] in [0,1]; each sample's error is the mean over positions weighed by
            these, and 0 if all of them are 0.
    """
    if sample_weights is None and position_weights is None:
        return F.mse_loss(model_pred.float(), target.float(), reduction="mean")
    squared_errors = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    if position_weights is None:
        errors = squared_errors.flatten(1).mean(1)
    else:
        weighed = (squared_errors.mean(1, keepdim=True) * position_weights).flatten(1).sum(1)
        errors = weighed / position_weights.flatten(1).sum(1).clamp(min=SMALLEST_WEIGHT)
    return (errors if sample_weights is None else errors * sample_weights).mean()
