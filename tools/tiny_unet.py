"""The miniature's UNet: Stable Diffusion's loss on latents and hidden states that the frozen parts have left."""

import torch
from torch.nn import functional as F

from tools.tiny_models import SCHEDULER_CONFIG
from tools.tiny_training import Average, autocast, captured, new_optimizer, set_lr, update


def alphas_cumprod(device):
    """Stable Diffusion's noise schedule: float [1000]."""
    start, end = SCHEDULER_CONFIG["beta_start"], SCHEDULER_CONFIG["beta_end"]
    betas = torch.linspace(start**0.5, end**0.5, SCHEDULER_CONFIG["num_train_timesteps"], dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def noise_prediction_loss(unet, latents, encoder_hidden_states, alphas):
    """The loss of Stable Diffusion on scaled latents [B, 4, 16, 16]."""
    noise = torch.randn_like(latents)
    timesteps = torch.randint(len(alphas), (len(latents),), device=latents.device)
    alpha = alphas[timesteps][:, None, None, None]
    noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
    return F.mse_loss(model_pred.float(), noise)


def train_unet(unet, cache, budget, batch_size):
    """cache: scaled latent mean, std [N, 4, 16, 16], hidden states [M, 77, 64] (row 0: no prompt), the pictures.

    unet becomes the average.
    """
    mean, std, hidden_states, pictures = cache
    device, parameters = budget.device, list(unet.parameters())
    optimizer, alphas = new_optimizer(parameters, device, weight_decay=0.01), alphas_cumprod(device)
    average = Average(parameters)
    budget.keep(unet=unet, optimizer=optimizer, average=average)

    def step_function():
        chosen = pictures.choose(batch_size)
        latents = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        without = torch.rand(batch_size, device=device) < 0.1
        captions = torch.where(without, 0, pictures.caption_index[chosen])
        with autocast(device):
            loss = noise_prediction_loss(unet, latents, hidden_states[captions], alphas)
        update(optimizer, loss, parameters)
        return loss.detach()

    set_lr(optimizer, 1e-3 * budget.rate, budget.step, budget.fraction)
    run_step = captured(step_function, device)
    for step, fraction in budget:
        set_lr(optimizer, 1e-3 * budget.rate, step, fraction)
        loss = run_step()
        average.update(step)
        budget.note(step, fraction, loss=loss)
    average.apply()
