"""The base pipeline's parts, loaded from a local folder and nowhere else."""

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.runtime.libraries import quiet_libraries

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from utils.errors import UserError
from utils.files.json_files import read_json
from utils.models.folder import MODEL_INDEX, VARIANTS, variant

WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
SHAREABLE = ("unet", "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")


def _load(cls: Any, folder: Path, part: str = "", **options: Any) -> Any:
    """`cls` from the folder `part` of a pipeline's, or from `folder` itself. Raises UserError if that fails."""
    if part:
        options["subfolder"] = part
    with quiet_libraries():
        try:
            return cls.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # a damaged folder fails in many ways, and every one is about the folder
            reason = " ".join(str(error).split())
            raise UserError(f"{folder / part} cannot be loaded as a {cls.__name__} ({reason})") from error


def _load_weights(cls: Any, folder: Path, part: str = "", **options: Any) -> torch.nn.Module:
    """A part with weights; UserError if the file lacks some: the libraries would fill them in at random."""
    options["variant"] = variant(folder / part)
    module, loading = _load(cls, folder, part, output_loading_info=True, **options)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{folder / part}: the weight file lacks {len(missing)} of {cls.__name__}'s tensors, {missing[0]} first; "
            f"copy or download the whole pipeline again"
        )
    return module


def _load_frozen(cls: Any, folder: Path, part: str, weight_dtype: torch.dtype, device: Any) -> torch.nn.Module:
    module = _load_weights(cls, folder, part).requires_grad_(False).eval()
    with quiet_libraries():
        return module.to(device, dtype=weight_dtype)


def load_tokenizer(folder: Path, tokenizer_name: Path | None = None) -> CLIPTokenizer:
    """CLIPTokenizer from `tokenizer_name` (a folder), else from the pipeline's tokenizer/."""
    if tokenizer_name:
        if not (Path(tokenizer_name) / "tokenizer_config.json").is_file():
            raise UserError(
                f"--tokenizer_name {tokenizer_name} is not a tokenizer's folder: no tokenizer_config.json in it"
            )
        return _load(CLIPTokenizer, Path(tokenizer_name))
    return _load(CLIPTokenizer, folder, "tokenizer")


def tokenize(tokenizer: CLIPTokenizer, prompt: str) -> torch.Tensor:
    """`input_ids` [1,77] of a prompt, padded and cut to the tokenizer's length as in the recipe."""
    length = tokenizer.model_max_length
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def load_text_encoder(folder: Path, weight_dtype: torch.dtype, device: Any) -> torch.nn.Module:
    """The frozen CLIPTextModel in `weight_dtype` on `device`."""
    return _load_frozen(CLIPTextModel, folder, "text_encoder", weight_dtype, device)


def load_vae(folder: Path, weight_dtype: torch.dtype, device: Any) -> torch.nn.Module:
    """The frozen AutoencoderKL in `weight_dtype` on `device`."""
    return _load_frozen(AutoencoderKL, folder, "vae", weight_dtype, device)


def load_unet(folder: Path) -> torch.nn.Module:
    """UNet2DConditionModel in training mode, float32 on the CPU: FlatParameters takes it from there."""
    return _load_weights(UNet2DConditionModel, folder, "unet").train()


def load_sampling_scheduler(folder: Path) -> PNDMScheduler:
    """PNDMScheduler, Stable Diffusion v1's own, with the noise schedule of the pipeline's scheduler."""
    return _load(PNDMScheduler, folder, "scheduler")


def load_noise_scheduler(folder: Path) -> DDPMScheduler:
    """DDPMScheduler with the noise schedule of the pipeline's own scheduler."""
    return _load(DDPMScheduler, folder, "scheduler")


def load_pipeline(
    folder: Path,
    weight_dtype: torch.dtype,
    device: torch.device,
    *,
    shared_with: StableDiffusionPipeline | None = None,
    safety_checker: bool = False,
) -> StableDiffusionPipeline:
    """Loads a pipeline folder, with the scheduler it names, onto `device` in `weight_dtype`, to draw images with.

    Args:
        shared_with: a loaded pipeline; components whose files equal its folder's are taken from it, not loaded again.
        safety_checker: whether to load the folder's safety checker and feature extractor; an image that it objects to
            becomes black.
    """
    folder = Path(folder)
    components: dict[str, Any] = {} if shared_with is None else dict(_common_components(shared_with, folder))
    for part, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        if part not in components:  # not `dtype`: diffusers 0.29, which ColossalAI pins, knows only torch_dtype
            components[part] = _load_weights(cls, folder, part, torch_dtype=weight_dtype)
    if "text_encoder" not in components:
        components["text_encoder"] = load_text_encoder(folder, weight_dtype, "cpu")
    if not safety_checker:
        components.update(safety_checker=None, feature_extractor=None)
    options: dict[str, Any] = dict(
        torch_dtype=weight_dtype, variant=variant(folder / "safety_checker"), image_encoder=None
    )
    pipeline = _load(StableDiffusionPipeline, folder, **options, **components)
    memory_format = torch.channels_last if device.type == "cuda" else torch.preserve_format
    pipeline.unet.to(memory_format=memory_format)
    pipeline.vae.to(memory_format=memory_format)
    pipeline.vae.enable_slicing()  # decodes one image at a time: the decoder's memory would grow with the batch
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _common_components(pipeline: StableDiffusionPipeline, folder: Path) -> Iterator[tuple[str, Any]]:
    """Those of a loaded pipeline's components, with their names, that the folder holds too."""
    for name in SHAREABLE:
        component = getattr(pipeline, name)
        if component is not None and same_component(Path(pipeline.name_or_path), folder, name):
            yield name, component


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


def _component_class(folder: Path, name: str) -> list | None:
    return read_json(folder / MODEL_INDEX).get(name)


def loaded_files(folder: Path) -> list[str]:
    """Names of a component's files, less those that loading passes over: variants, .bin beside .safetensors."""
    files = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    plain = [name for name in files if not any(variant in name for variant in VARIANTS)]
    files = plain if any(name.endswith((".safetensors", ".bin")) for name in plain) else files
    if any(name.endswith(".safetensors") for name in files):
        files = [name for name in files if not name.endswith((".bin", ".ckpt", ".msgpack", ".h5"))]
    return sorted(files)
