"""Images from pipeline folders: loading them, sharing what two have in common, sampling a prompt, writing files."""

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

from utils.runtime.libraries import quiet_libraries

import numpy as np
import torch
from PIL import Image

from utils.errors import UserError
from utils.models import loading
from utils.models.captured_unet import CapturedUNet

logging.disable(logging.WARNING)  # what is imported here advises on optional packages that are not used
import diffusers  # noqa: E402
import transformers  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402

logging.disable(logging.NOTSET)


class PromptEmbeddings:
    """Text to `encoder_hidden_states`, once for each text and text encoder."""

    def __init__(self, negative_prompt: str | None, guidance_scale: float):
        self.negative_prompt = negative_prompt
        self.is_guided = guidance_scale > 1
        self._known: dict = {}

    def __call__(self, pipeline: StableDiffusionPipeline, prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds) [1,77,D] each; the second is None without guidance."""
        key = (id(pipeline.text_encoder), prompt)
        if key not in self._known:
            with quiet_libraries():
                self._known[key] = pipeline.encode_prompt(
                    prompt, pipeline.device, 1, self.is_guided, negative_prompt=self.negative_prompt
                )
        return self._known[key]


def num_denoising_steps(
    pipeline: StableDiffusionPipeline, num_images: int, num_inference_steps: int, batch_size: int | None = None
) -> int:
    """How often `sample` calls `on_step`: some schedulers call the UNet more often than num_inference_steps."""
    pipeline.scheduler.set_timesteps(num_inference_steps)
    return len(pipeline.scheduler.timesteps) * math.ceil(num_images / (batch_size or num_images))


@torch.inference_mode()
def sample(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    seeds: list[int],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    batch_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    embeddings: "PromptEmbeddings | None" = None,
    captured: CapturedUNet | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Image.Image]:
    """One image a seed. Each has its own CPU generator, so it does not depend on the batch, the dtype or the device.

    Args:
        batch_size: images at once; all of them when None.
        height, width: pixels; the model's own when None.
        embeddings: shared between calls, and made with the same negative prompt and guidance: encodes no text twice.
        captured: calls the UNet, on a GPU; shared between calls and models.
        on_step: called after every denoising step of every batch (on a GPU: when it has been launched).
    """
    own_height, own_width = image_size(pipeline)
    embeddings = embeddings or PromptEmbeddings(negative_prompt, guidance_scale)
    prompt_embeds, negative_prompt_embeds = embeddings(pipeline, prompt)
    options = dict(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)
    options |= dict(height=height or own_height, width=width or own_width)
    options |= dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    def step_end(_pipeline, _step, _timestep, callback_kwargs):
        on_step()
        return callback_kwargs

    batch_size, images = batch_size or len(seeds), []
    with contextlib.nullcontext() if captured is None else captured.serving(pipeline):
        for start in range(0, len(seeds), batch_size):
            images += _batch(pipeline, seeds[start : start + batch_size], callback_on_step_end=step_end, **options)
    return images


def _batch(pipeline: StableDiffusionPipeline, seeds: list[int], **options) -> list[Image.Image]:
    """One call of the pipeline. Raises UserError where the GPU's memory is too small for it."""
    try:
        if pipeline.device.type == "cuda":
            return to_pil(draw(pipeline, seeds, output_type="pt", **options))
        return draw(pipeline, seeds, **options)
    except torch.cuda.OutOfMemoryError as error:
        mend = f"--batch_size {len(seeds) // 2}" if len(seeds) > 1 else "a smaller --height and --width"
        raise UserError(f"the GPU's memory is too small for {len(seeds)} images at once: give {mend}") from error


def truncated_text(pipeline: StableDiffusionPipeline, prompt: str) -> str:
    """The end of `prompt` that the text encoder does not see ("" for most prompts)."""
    tokenizer = pipeline.tokenizer
    with quiet_libraries():
        input_ids = tokenizer(prompt).input_ids
    return tokenizer.decode(input_ids[tokenizer.model_max_length - 1 : -1], skip_special_tokens=True).strip()


def versions() -> dict[str, str]:
    """Versions of the libraries that the images depend on."""
    return {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}


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
        with quiet_libraries():
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
