"""The base pipeline's parts, loaded from a local folder and nowhere else."""

import contextlib
import filecmp
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from utils.runtime.libraries import quiet_libraries

import diffusers
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextModel, CLIPTokenizer

from utils.errors import UserError
from utils.models.folder import BaseModel, find_weights, part_files
from utils.models.weight_files import SAFETENSORS, read_onto

WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
MAX_TOKENS = 77  # of CLIP's text encoder
LONGEST = 100_000  # transformers' stand-in for a length that the tokenizer's folder does not say is far above
CLASSES: dict[str, Any] = dict(unet=UNet2DConditionModel, vae=diffusers.AutoencoderKL, text_encoder=CLIPTextModel)
CLASSES["safety_checker"] = StableDiffusionSafetyChecker
SHAREABLE = ("unet", "vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")


@contextlib.contextmanager
def _loading(cls: Any, folder: Path) -> Iterator[None]:
    """Quiet; what fails within is a UserError: a damaged folder fails in many ways, every one about the folder."""
    with quiet_libraries():
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} cannot be loaded as a {cls.__name__} ({reason})") from error


def _load(cls: Any, folder: Path, **options: Any) -> Any:
    with _loading(cls, folder):
        return cls.from_pretrained(folder, local_files_only=True, **options)


def _load_weights(cls: Any, base: BaseModel, part: str, **options: Any) -> torch.nn.Module:
    """A part with weights. Raises UserError if the file lacks some, which the libraries would fill in at random, and
    if one is not finite."""
    place = base.folder / part
    with _plain_folder(base, part) as plain:
        try:
            options["use_safetensors"] = base.weights[part].kind == SAFETENSORS  # else it is looked for, and missed
            module, loading = _load(cls, plain, output_loading_info=True, **options)
        except UserError as error:
            raise UserError(str(error).replace(str(plain), str(place))) from error
    _check_whole(module, sorted(loading["missing_keys"]), place)
    return module


def _check_whole(module: torch.nn.Module, missing: list[str], place: Path) -> None:
    if missing:
        raise UserError(f"{place}: the file lacks {len(missing)} of its tensors, {missing[0]} first: use another copy")
    check_finite(module, place)


@contextlib.contextmanager
def _plain_folder(base: BaseModel, part: str) -> Iterator[Path]:
    """A part's folder as every version of the libraries loads it: links to the right weights under the usual names."""
    folder, weights = base.folder / part, base.weights[part]
    is_plain = not weights.index and all(name == path.name for name, path in weights.plain_names.items())
    if is_plain and not any(folder.glob("*.index.*json")):
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        plain = Path(made)
        for name, path in {"config.json": folder / "config.json", **weights.plain_names}.items():
            (plain / name).symlink_to(path.resolve())
        for name, index in weights.index.items():
            (plain / name).write_text(json.dumps(index))
        yield plain


def check_finite(module: torch.nn.Module, place: Path) -> None:
    """UserError names the first tensor in `place` with a NaN or an infinity, by sums at the memory's speed."""
    named = list(module.named_parameters())
    sums = torch.stack([value.detach().sum(dtype=torch.float32) for _, value in named])
    for index in (~sums.isfinite()).nonzero().flatten().tolist():
        name, value = named[index]
        if count := int((~value.isfinite()).sum()):
            what = f"{count} of {value.numel()} values of {name}"
            raise UserError(f"{place}: {what} are NaN or infinite (a merge that failed?): use another copy")


def load_frozen(
    base: BaseModel,
    part: str,
    weight_dtype: torch.dtype,
    device: torch.device | str,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.nn.Module:
    """One of CLASSES to draw with or to encode with, in `weight_dtype` on `device`, 4-D weights in `memory_format`.

    It is loaded as float32: transformers would read the weights in the dtype that config.json names, and not in the
    file's. A GPU rounds and reorders what it has been given much faster than the CPU could before: the bits are equal.
    """
    module = _load_weights(CLASSES[part], base, part, torch_dtype=torch.float32).requires_grad_(False).eval()
    for value in (*module.parameters(), *module.buffers()):
        moved, dtype = value.data.to(device), weight_dtype if value.is_floating_point() else value.dtype
        value.data = moved.to(dtype, memory_format=memory_format if value.dim() == 4 else torch.preserve_format)
    return module


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIPTokenizer from its own folder."""
    tokenizer = _load(CLIPTokenizer, folder)
    if tokenizer.model_max_length > LONGEST:
        tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def tokenize(prompt: str, tokenizer: CLIPTokenizer, text_encoder: Any) -> torch.Tensor:
    """`input_ids` [1,77] of a prompt as in the recipe, learned tokens as in diffusers; UserError for an unknown."""
    length = tokenizer.model_max_length
    text = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    most, rows = int(ids.max()), text_encoder.get_input_embeddings().num_embeddings
    if most >= rows:
        raise UserError(
            f"{prompt!r} has token number {most}, but the text encoder knows {rows}: the tokenizer has learned tokens "
            f"(textual inversion) that text_encoder/ lacks; use the two that were saved together, or another prompt"
        )
    return ids


def load_safety_checker(folder: Path, device: torch.device | str) -> torch.nn.Module:
    """A pipeline folder's safety checker in float32 on `device`. Raises UserError if it cannot be loaded."""
    base = BaseModel(folder, {}, {}, {"safety_checker": find_weights(folder, "safety_checker")})
    return load_frozen(base, "safety_checker", torch.float32, device)


def load_unet(base: BaseModel, tensors: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """UNet2DConditionModel in training mode, float32: FlatParameters takes it from there. Raises as _load_weights.

    Args:
        tensors: its weights, where they have been read before, on whichever device they are; they become the module's,
            and the dictionary empty. Without them they are read onto the CPU.
    """
    place, config, weights = base.folder / "unet", base.configs["unet"], base.weights["unet"]
    tensors = read_onto(weights.files, "cpu") if tensors is None else tensors
    values = {name: tensors.pop(name).float() for name in list(tensors)}
    with _loading(UNet2DConditionModel, place):
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(config)
        missing = unet.load_state_dict(values, strict=False, assign=True).missing_keys
    _check_whole(unet, sorted(missing), place)
    return unet.train()


def load_sampling_scheduler(base: BaseModel) -> Any:
    """The scheduler that the folder names, which its pipelines draw with."""
    return _load(getattr(diffusers, base.index["scheduler"][1]), base.folder / "scheduler")


def quick_scheduler(scheduler: Any) -> diffusers.DPMSolverMultistepScheduler:
    """DPM-Solver++ with the noise schedule of a pipeline's own scheduler: near its pictures in a few steps."""
    with quiet_libraries():
        return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)


def load_noise_scheduler(base: BaseModel) -> DDPMScheduler:
    """DDPMScheduler with the noise schedule of the pipeline's own scheduler."""
    return _load(DDPMScheduler, base.folder / "scheduler")


def load_pipeline(
    base: BaseModel,
    weight_dtype: torch.dtype,
    device: torch.device,
    *,
    shared: Mapping[str, Any] = MappingProxyType({}),
    safety_checker: bool = False,
) -> StableDiffusionPipeline:
    """Loads a pipeline folder, with the scheduler it names, onto `device` in `weight_dtype`, to draw images with.

    Args:
        shared: components of another pipeline, by their names, that are used as they are, not loaded again.
        safety_checker: whether to load the folder's safety checker and feature extractor; an image that it objects to
            becomes black.
    """
    components = dict(shared)
    for part in CLASSES:
        on_gpu = device.type == "cuda" and part in ("unet", "vae")
        if part not in components and (part != "safety_checker" or safety_checker):
            layout = torch.channels_last if on_gpu else torch.preserve_format
            components[part] = load_frozen(base, part, weight_dtype, device, layout)
    components["tokenizer"] = components.get("tokenizer") or load_tokenizer(base.folder / "tokenizer")
    if not safety_checker:
        components.update(safety_checker=None, feature_extractor=None)
    # Not `dtype`: diffusers 0.29, which ColossalAI pins, knows only torch_dtype.
    pipeline = _load(StableDiffusionPipeline, base.folder, torch_dtype=weight_dtype, image_encoder=None, **components)
    pipeline.vae.enable_slicing()  # decodes one image at a time: the decoder's memory would grow with the batch
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def common_components(pipeline: StableDiffusionPipeline, folder: Path) -> dict[str, Any]:
    """{name: component} of a loaded pipeline's components that the folder holds too."""
    loaded = {name: component for name in SHAREABLE if (component := getattr(pipeline, name)) is not None}
    return {name: each for name, each in loaded.items() if same_component(Path(pipeline.name_or_path), folder, name)}


def shared_components(pipeline: StableDiffusionPipeline, other: StableDiffusionPipeline) -> list[str]:
    """Names of the components that both pipelines hold as one object."""
    pairs = ((name, getattr(pipeline, name), getattr(other, name)) for name in SHAREABLE)
    return [name for name, ours, theirs in pairs if ours is not None and ours is theirs]


def same_component(folder: Path, other_folder: Path, name: str) -> bool:
    """Whether the files of component `name` that are loaded are the same, byte for byte, in both folders."""
    files, others = part_files(folder, name), part_files(other_folder, name)
    if files.keys() != others.keys():
        return False
    pairs = [(path, others[file]) for file, path in files.items()]
    if any(ours.stat().st_size != theirs.stat().st_size for ours, theirs in pairs):
        return False
    # Bytes rather than digests: it stops at the first difference, which two UNets have early.
    return all(ours.samefile(theirs) or filecmp.cmp(ours, theirs, shallow=False) for ours, theirs in pairs)
