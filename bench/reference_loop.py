"""The usual training loop, to compare with: fp32 weights, autocast, GradScaler, torch's AdamW, VAE and text encoder
every step."""

from pathlib import Path

import torch


class ReferenceLoop:
    """On a GPU in fp16 by autocast, on a CPU in fp32.

    Args:
        model: the base pipeline's folder.
        prompt: the instance prompt.
    """

    def __init__(self, model: Path, device: str, learning_rate: float = 1e-6, prompt: str = "a photo of my cat."):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.device, self.on_gpu = device, device == "cuda"
        dtype = torch.float16 if self.on_gpu else torch.float32
        self.vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device, dtype)
        self.text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").to(device, dtype)
        tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
        self.unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").float().to(device).train()
        self.scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=learning_rate, weight_decay=1e-2)
        self.scaler = torch.amp.GradScaler(device, enabled=self.on_gpu)
        self.input_ids = tokenizer([prompt], padding="max_length", max_length=77, return_tensors="pt").input_ids

    def step(self, pixel_values: torch.Tensor, latent_noise=None, noise=None, timesteps=None) -> float:
        """One step on pixel_values [B,3,R,R]; what is not given is drawn at random. Returns the loss."""
        with torch.no_grad():
            latent_dist = self.vae.encode(pixel_values.to(self.device, self.vae.dtype)).latent_dist
            drawn = torch.randn_like(latent_dist.mean) if latent_noise is None else latent_noise.to(self.device)
            latents = (latent_dist.mean + latent_dist.std * drawn) * self.vae.config.scaling_factor
            input_ids = self.input_ids.expand(len(latents), -1).to(self.device)
            encoder_hidden_states = self.text_encoder(input_ids)[0]
        noise = torch.randn_like(latents) if noise is None else noise.to(self.device)
        if timesteps is None:
            timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),))
        timesteps = timesteps.to(self.device)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(self.device, torch.float16, enabled=self.on_gpu):
            model_pred = self.unet(noisy_latents, timesteps, encoder_hidden_states).sample
        loss = torch.nn.functional.mse_loss(model_pred.float(), noise.float())
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.item()
