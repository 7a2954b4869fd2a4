"""Drawing images with a loaded pipeline from seeds: what evaluation, class images and validation have in common."""

import numpy as np
import torch
from PIL import Image

from utils.models.loading import quiet_libraries


def image_size(pipeline) -> tuple[int, int]:
    """(height, width) in pixels that the pipeline's UNet was made for."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def initial_latents(pipeline, generators: list[torch.Generator], height: int, width: int) -> torch.Tensor:
    """Noise [N, C, height/f, width/f] in fp32 on the CPU; row n is drawn from generators[n] alone."""
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, height // factor, width // factor)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


def draw(pipeline, seeds: list[int], *, height: int, width: int, **arguments):
    """The pipeline's images, one a seed, all at once: each has its own CPU generator, whatever the batch or dtype.

    Args:
        arguments: the pipeline's own; with output_type="pt" the result is a tensor [N,3,H,W] in [0,1].
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    latents = initial_latents(pipeline, generators, height, width)
    with quiet_libraries():
        return pipeline(
            num_images_per_prompt=len(seeds),
            height=height,
            width=width,
            latents=latents.to(pipeline.unet.dtype),
            generator=generators,
            **arguments,
        ).images


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images [N,3,H,W] in [0,1] as 8 bits, rounded as diffusers does; on a GPU before they leave it."""
    pixels = (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.cpu().numpy()]


def is_blank(image: Image.Image | np.ndarray) -> bool:
    """Whether an image, RGB or floats [H,W,3] in [0,1], is of one colour in 8 bits, or holds a not-a-number."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels).all():
            return True
        pixels = np.round(pixels * 255)
    return bool((pixels == pixels[0, 0]).all())
