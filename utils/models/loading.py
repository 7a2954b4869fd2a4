"""The base pipeline's parts, loaded from a local folder and nowhere else."""

import filecmp
import json
import os
from pathlib import Path

from utils.runtime.libraries import quiet_libraries

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from utils.errors import UserError
from utils.files.json_files import read_json
from utils.models.folder import has_only_fp16_variants

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


def _load(cls, folder: Path, part: str = "", **options):
    with quiet_libraries():
        try:
            return cls.from_pretrained(folder, subfolder=part, local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder / part} cannot be loaded as a {cls.__name__} ({reason})") from error


def _load_weights(cls, folder: Path, part: str) -> torch.nn.Module:
    """A part with weights; UserError where the file lacks some: the libraries would fill them in at random."""
    module, loading = _load(cls, folder, part, output_loading_info=True, **_variant(folder, part))
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{folder / part}: the weight file lacks {len(missing)} of {cls.__name__}'s tensors, {missing[0]} first; "
            f"copy or download the whole pipeline again"
        )
    return module


def _load_frozen(cls, folder: Path, part: str, weight_dtype: torch.dtype, device) -> torch.nn.Module:
    module = _load_weights(cls, folder, part).requires_grad_(False).eval()
    with quiet_libraries():
        return module.to(device, dtype=weight_dtype)


def _variant(folder: Path, part: str) -> dict:
    """Asks for the fp16 files where a part has no others."""
    return {"variant": "fp16"} if has_only_fp16_variants(folder / part) else {}


def load_tokenizer(folder: Path, tokenizer_name: str | None = None):
    """CLIPTokenizer from `tokenizer_name` (a folder), else from the pipeline's tokenizer/."""
    from transformers import CLIPTokenizer

    if tokenizer_name:
        if not (Path(tokenizer_name) / "tokenizer_config.json").is_file():
            raise UserError(
                f"--tokenizer_name {tokenizer_name} is not a tokenizer's folder: no tokenizer_config.json in it"
            )
        return _load(CLIPTokenizer, Path(tokenizer_name))
    return _load(CLIPTokenizer, folder, "tokenizer")


def tokenize(tokenizer, prompt: str) -> torch.Tensor:
    """`input_ids` [1,77] of a prompt, padded and cut to the tokenizer's length as in the recipe."""
    length = tokenizer.model_max_length
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def load_text_encoder(folder: Path, weight_dtype: torch.dtype, device) -> torch.nn.Module:
    """The frozen CLIPTextModel in `weight_dtype` on `device`."""
    from transformers import CLIPTextModel

    return _load_frozen(CLIPTextModel, folder, "text_encoder", weight_dtype, device)


def load_vae(folder: Path, weight_dtype: torch.dtype, device) -> torch.nn.Module:
    """The frozen AutoencoderKL in `weight_dtype` on `device`."""
    with quiet_libraries():
        from diffusers import AutoencoderKL

    return _load_frozen(AutoencoderKL, folder, "vae", weight_dtype, device)


def load_unet(folder: Path) -> torch.nn.Module:
    """UNet2DConditionModel in training mode, float32 on the CPU: FlatParameters takes it from there."""
    with quiet_libraries():
        from diffusers import UNet2DConditionModel

    return _load_weights(UNet2DConditionModel, folder, "unet").train()


def load_sampling_scheduler(folder: Path):
    """PNDMScheduler, Stable Diffusion v1's own, with the noise schedule of the pipeline's scheduler."""
    from diffusers import PNDMScheduler

    return _load(PNDMScheduler, folder, "scheduler")


def load_noise_scheduler(folder: Path):
    """DDPMScheduler with the noise schedule of the pipeline's own scheduler."""
    with quiet_libraries():
        from diffusers import DDPMScheduler

    return _load(DDPMScheduler, folder, "scheduler")


def load_class_pipeline(folder: Path, weight_dtype: torch.dtype, device):
    """The base pipeline with the scheduler it names, without safety checker: a black image would be trained on."""
    import diffusers

    config = read_json(folder / "scheduler" / "scheduler_config.json")
    with quiet_libraries():
        pipeline = diffusers.StableDiffusionPipeline(
            vae=load_vae(folder, weight_dtype, device),
            text_encoder=load_text_encoder(folder, weight_dtype, device),
            tokenizer=load_tokenizer(folder),
            unet=load_unet(folder).requires_grad_(False).eval().to(device, dtype=weight_dtype),
            scheduler=getattr(diffusers, config["_class_name"]).from_config(config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if device.type == "cuda":
        pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SHAREABLE = ("unet", "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")


VARIANTS = (".fp16.", ".bf16.", ".non_ema.")  # weights beside the plain ones


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
