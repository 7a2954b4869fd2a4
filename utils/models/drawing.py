"""Images from pipeline folders: loading them, sharing what two have in common, sampling a prompt, writing files."""

import contextlib
import filecmp
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.drawing import draw, image_size, to_pil
from utils.errors import UserError
from utils.models.captured_unet import CapturedUNet
from utils.models.loading import quiet_libraries

logging.disable(logging.WARNING)  # what is imported here advises on optional packages that are not used
import diffusers  # noqa: E402
import transformers  # noqa: E402
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402

logging.disable(logging.NOTSET)

SHAREABLE = ("unet", "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
VARIANTS = (".fp16.", ".bf16.", ".non_ema.")  # weights beside the plain ones


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pipeline(
    folder: str | os.PathLike,
    weight_dtype: torch.dtype,
    device: torch.device,
    *,
    shared_with: StableDiffusionPipeline | None = None,
    safety_checker: bool = False,
) -> StableDiffusionPipeline:
    """Loads a pipeline folder onto `device` in `weight_dtype`, without network.

    Args:
        shared_with: a loaded pipeline; components whose files equal its folder's are taken from it, not loaded again.
        safety_checker: whether to load the folder's safety checker and feature extractor.
    """
    components = {"image_encoder": None}
    if not safety_checker:
        components.update(safety_checker=None, feature_extractor=None)
    if shared_with is not None:
        for name in SHAREABLE:
            component = getattr(shared_with, name)
            if component is not None and same_component(Path(shared_with.name_or_path), Path(folder), name):
                components[name] = component
    try:
        with quiet_libraries():
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder,
                torch_dtype=weight_dtype,  # not `dtype`: diffusers 0.29, which ColossalAI pins, knows only this
                variant=_pipeline_variant(Path(folder)),
                local_files_only=True,
                **components,
            )
    except Exception as error:  # a damaged folder fails in many ways, and every one is about the folder
        raise UserError(f"{folder} could not be loaded: {_first_line(error)} (--debug shows more)") from error
    memory_format = torch.channels_last if device.type == "cuda" else torch.preserve_format
    pipeline.unet.to(memory_format=memory_format)
    pipeline.vae.to(memory_format=memory_format)
    pipeline.vae.enable_slicing()  # decodes one image at a time: the decoder's memory would grow with the batch
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def shared_components(pipeline: StableDiffusionPipeline, other: StableDiffusionPipeline) -> list[str]:
    """Names of the components that both pipelines hold as one object."""
    pairs = ((name, getattr(pipeline, name), getattr(other, name)) for name in SHAREABLE)
    return [name for name, ours, theirs in pairs if ours is not None and ours is theirs]


def same_component(folder: Path, other_folder: Path, name: str) -> bool:
    """Whether the files of component `name` that are loaded are the same, byte for byte, in both folders."""
    if _component_class(folder, name) != _component_class(other_folder, name):
        return False
    names = loaded_files(folder / name)
    if names != loaded_files(other_folder / name):
        return False
    pairs = [(folder / name / file, other_folder / name / file) for file in names]
    if any(ours.stat().st_size != theirs.stat().st_size for ours, theirs in pairs):
        return False
    # Bytes rather than digests: it stops at the first difference, which two UNets have early.
    return all(ours.samefile(theirs) or filecmp.cmp(ours, theirs, shallow=False) for ours, theirs in pairs)


def with_unet(pipeline: StableDiffusionPipeline, unet_folder: Path) -> StableDiffusionPipeline:
    """`pipeline` with the UNet of a checkpoint; every other module is the same object."""
    try:
        with quiet_libraries():
            unet = UNet2DConditionModel.from_pretrained(
                unet_folder, torch_dtype=pipeline.unet.dtype, local_files_only=True
            )
    except Exception as error:  # a damaged folder fails in many ways, and every one is about the folder
        raise UserError(f"{unet_folder} could not be loaded: {_first_line(error)} (--debug shows more)") from error
    memory_format = torch.channels_last if pipeline.device.type == "cuda" else torch.preserve_format
    unet.to(pipeline.device).to(memory_format=memory_format)
    components = pipeline.components | dict(unet=unet)
    with quiet_libraries():
        other = StableDiffusionPipeline(**components, requires_safety_checker=pipeline.safety_checker is not None)
    other.set_progress_bar_config(disable=True)
    return other


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


def save_png(path: Path, image: Image.Image, texts: dict[str, object]) -> None:
    """Writes a PNG whose text metadata holds `texts`, less those that are None."""
    metadata = PngInfo()
    for name, value in texts.items():
        if value is not None:
            metadata.add_itxt(name, str(value))
    replace_file(path, lambda file: image.save(file, "PNG", pnginfo=metadata))


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside `path`, then renames it: `path` is the old file or the whole new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _component_class(folder: Path, name: str) -> list | None:
    return json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get(name)


def _pipeline_variant(folder: Path) -> str | None:
    """fp16 where a component has its weights as that variant only."""
    for name in ("unet", "vae", "text_encoder"):
        weights = [path.name for path in (folder / name).iterdir() if path.suffix in (".safetensors", ".bin")]
        if weights and all(".fp16." in file for file in weights):
            return "fp16"
    return None


def loaded_files(folder: Path) -> list[str]:
    """Names of a component's files, less those that loading passes over: variants, .bin beside .safetensors."""
    files = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    plain = [name for name in files if not any(variant in name for variant in VARIANTS)]
    files = plain if any(name.endswith((".safetensors", ".bin")) for name in plain) else files
    if any(name.endswith(".safetensors") for name in files):
        files = [name for name in files if not name.endswith((".bin", ".ckpt", ".msgpack", ".h5"))]
    return sorted(files)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
