"""Images from a loaded pipeline: each depends on its prompt, its settings and its seed alone."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from utils.runtime.libraries import quiet_libraries

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image

from utils.errors import UserError
from utils.models import loading
from utils.models.captured_unet import CapturedUNet
from utils.models.folder import BaseModel, in_pixels

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 50, 7.5


class NotANumber(UserError):
    """A pipeline draws NaN or infinity."""


SMALLER = ("--batch_size", "a smaller --height and --width")


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
            for text in (prompt, self.negative_prompt or ""):
                loading.tokenize(text, pipeline.tokenizer, pipeline.text_encoder)  # says what cannot be encoded
            with quiet_libraries():
                self._known[key] = pipeline.encode_prompt(
                    prompt, pipeline.device, 1, self.is_guided, negative_prompt=self.negative_prompt
                )
        return self._known[key]

    def of_batch(self, pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> dict[str, Any]:
        """The pipeline's keywords for images of these prompts: a row for all if it is one prompt, else a row each."""
        rows = [self(pipeline, prompt) for prompt in (prompts if len(set(prompts)) > 1 else prompts[:1])]
        embeds, negative = zip(*rows, strict=True)
        unwanted = torch.cat(negative) if self.is_guided else None
        return dict(prompt_embeds=torch.cat(embeds), negative_prompt_embeds=unwanted)


def num_denoising_steps(
    pipeline: StableDiffusionPipeline, num_images: int, num_inference_steps: int, batch_size: int | None = None
) -> int:
    """How often `sample` calls `on_step`: some schedulers call the UNet more often than num_inference_steps."""
    pipeline.scheduler.set_timesteps(num_inference_steps)
    return len(pipeline.scheduler.timesteps) * math.ceil(num_images / (batch_size or num_images))


@torch.inference_mode()
def sample(
    pipeline: StableDiffusionPipeline,
    prompt: str | Sequence[str],
    seeds: list[int],
    *,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    negative_prompt: str | None = None,
    batch_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    embeddings: PromptEmbeddings | None = None,
    captured: CapturedUNet | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> list[Image.Image]:
    """One image a seed. Each has its own CPU generator, so it does not depend on the batch, the dtype or the device.

    Args:
        prompt: of all images, or one an image.
        batch_size, height, width: images at once, and pixels; when None all of them, and the model's own size.
        embeddings: shared between calls, and made with the same negative prompt and guidance: encodes no text twice.
        captured: calls the UNet by graphs, on a GPU; shared between calls and models.
        on_step: called after every denoising step of every batch (on a GPU: when it has been launched).

    Raises NotANumber if an image holds one that is none.
    """
    embeddings = embeddings or PromptEmbeddings(negative_prompt, guidance_scale)
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else prompt
    options: dict[str, Any] = dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    own_height, own_width = image_size(pipeline)
    options |= dict(height=height or own_height, width=width or own_width, callback_on_step_end=_calling(on_step))
    batch_size, images = batch_size or len(seeds), []
    with contextlib.nullcontext() if captured is None else captured.serving(pipeline):
        for start in range(0, len(seeds), batch_size):
            texts = prompts[start : start + batch_size]
            options |= embeddings.of_batch(pipeline, texts)
            batch = draw(pipeline, seeds[start : start + batch_size], smaller=SMALLER, **options)
            check_numbers(batch, texts, pipeline)
            images += to_pil(batch)
    return images


def check_numbers(batch: torch.Tensor, texts: Sequence[str], pipeline: StableDiffusionPipeline) -> None:
    """Raises NotANumber, naming its prompt, if an image [N,...] holds a value that is none."""
    why = "its weights have grown too large: train again at a lower learning rate, or take an earlier checkpoint"
    if pipeline.unet.dtype == torch.float16:
        why = "they are too large for fp16: try --mixed_precision no"
    for text, is_finite in zip(texts, batch.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not is_finite:
            raise NotANumber(f'the images of "{text}" are not numbers: {why}')


def _calling(on_step: Callable[[], object]) -> Callable:
    """`on_step` as the callback that a pipeline calls after every denoising step."""

    def step_end(_pipeline: Any, _step: int, _timestep: Any, callback_kwargs: dict) -> dict:
        on_step()
        return callback_kwargs

    return step_end


def truncated_text(pipeline: StableDiffusionPipeline, prompt: str) -> str:
    """The end of `prompt` that the text encoder does not see ("" for most prompts)."""
    tokenizer = pipeline.tokenizer
    with quiet_libraries():
        input_ids = tokenizer(prompt).input_ids
    return tokenizer.decode(input_ids[tokenizer.model_max_length - 1 : -1], skip_special_tokens=True).strip()


def versions() -> dict[str, str]:
    """Versions of the libraries that the images depend on."""
    return {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}


def image_size(pipeline: StableDiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels that the pipeline's UNet was made for."""
    return in_pixels(pipeline.unet.config.sample_size, pipeline.vae_scale_factor)


def draw(
    pipeline: StableDiffusionPipeline,
    seeds: list[int],
    *,
    height: int,
    width: int,
    smaller: tuple[str, str] | None = None,
    output_type: str = "pt",
    **arguments: Any,
) -> torch.Tensor:
    """The pipeline's images [N,3,H,W] in [0,1], one a seed, all at once.

    Args:
        smaller: for the UserError if the GPU's memory is too small, the flag that makes the batch smaller, and what
            else to give for one image; None leaves torch's own error.
        output_type, arguments: the pipeline's own; prompt_embeds are of all images [1,77,D], or one row an image.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, height // factor, width // factor)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])  # float32, on the CPU
    latents = noise.to(pipeline.unet.dtype)
    rows = arguments.get("prompt_embeds")
    of_each = len(seeds) // (1 if rows is None else len(rows))
    options = dict(num_images_per_prompt=of_each, height=height, width=width, output_type=output_type, **arguments)
    try:
        with quiet_libraries():
            return pipeline(latents=latents, generator=generators, **options).images
    except torch.cuda.OutOfMemoryError as error:
        if smaller is None:
            raise
        flag = f"{smaller[0]} {len(seeds) // 2}" if len(seeds) > 1 else smaller[1]
        raise UserError(f"the GPU's memory is too small for {len(seeds)} images at once: give {flag}") from error


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images [N,3,H,W] in [0,1], all numbers, as 8 bits, rounded as diffusers does; on a GPU before they leave it."""
    pixels = (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.cpu().numpy()]


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB image is of one colour."""
    pixels = np.asarray(image)
    return bool((pixels == pixels[0, 0]).all())


class Sampler:
    """Draws the validation prompts with the modules that are loaded already.

    Args:
        base: for its scheduler and its size.
        vae: on the device.
        prompt_embeds, negative_prompt_embeds: the validation prompts', [P,77,C], and the negative one's, [1,77,C].
    """

    def __init__(
        self,
        base: BaseModel,
        vae: torch.nn.Module,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        *,
        num_inference_steps: int = NUM_INFERENCE_STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
    ):
        self.vae = vae
        self.scheduler = loading.load_sampling_scheduler(base)
        self.prompt_embeds = prompt_embeds
        height, width = base.image_size
        self.settings: dict[str, Any] = dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        self.settings |= dict(negative_prompt_embeds=negative_prompt_embeds, height=height, width=width)

    @torch.no_grad()
    def __call__(self, unet: torch.nn.Module, num_images: int, seed: int) -> list[Image.Image]:
        """The images of the first prompt, then of the second: number k with a CPU generator seeded with seed + k."""
        parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        with quiet_libraries():
            pipeline = StableDiffusionPipeline(
                vae=self.vae, unet=unet, scheduler=self.scheduler, requires_safety_checker=False, **parts
            )
        pipeline.set_progress_bar_config(disable=True)
        return [
            image
            for prompt_embeds in self.prompt_embeds.split(1)
            for number in range(num_images)
            for image in to_pil(draw(pipeline, [seed + number], prompt_embeds=prompt_embeds, **self.settings))
        ]
