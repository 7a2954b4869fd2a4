"""Samples of the UNet in training, by the modules that are loaded already."""

from pathlib import Path

import torch

from utils.drawing import draw, image_size
from utils.models import loading

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 50, 7.5


class Sampler:
    """Draws the validation prompt with the modules that are loaded already.

    Args:
        folder: the base pipeline's, for its scheduler.
        vae: on the device.
        prompt_embeds, negative_prompt_embeds: the validation prompt's and the empty prompt's, [1,77,C].
    """

    def __init__(self, folder: Path, vae: torch.nn.Module, prompt_embeds: torch.Tensor, negative_prompt_embeds):
        self.vae = vae
        self.scheduler = loading.load_sampling_scheduler(folder)
        self.embeds = dict(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)

    @torch.no_grad()
    def __call__(self, unet: torch.nn.Module, num_images: int, seed: int) -> list:
        """PIL images; number k is drawn with a CPU generator seeded with seed + k, whatever the number of images."""
        parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        with loading.quiet_libraries():
            from diffusers import StableDiffusionPipeline

            pipeline = StableDiffusionPipeline(
                vae=self.vae, unet=unet, scheduler=self.scheduler, requires_safety_checker=False, **parts
            )
        pipeline.set_progress_bar_config(disable=True)
        height, width = image_size(pipeline)
        settings = dict(num_inference_steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE)
        images = []
        for number in range(num_images):
            images += draw(pipeline, [seed + number], height=height, width=width, **settings, **self.embeds)
        return images
