"""The base pipeline's parts, loaded from a local folder and nowhere else."""

import contextlib
import functools
import os
import warnings
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from utils.errors import UserError
from utils.models.check import has_only_fp16_variants

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


@contextlib.contextmanager
def quiet_libraries():
    """Only errors from diffusers and transformers: their notes are about options that this program does not have."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    progress_bars = transformers_logging.is_progress_bar_enabled()
    for module, _ in before:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, verbosity in before:
            module.set_verbosity(verbosity)
        if progress_bars:
            transformers_logging.enable_progress_bar()


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


def enable_gradient_checkpointing(unet: torch.nn.Module) -> None:
    """Recomputes activations in the backward pass.

    The random state is not saved and restored, which a CUDA graph could not capture: the UNet draws nothing.
    """
    unet.enable_gradient_checkpointing()
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for module in unet.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = recompute


def load_sampling_scheduler(folder: Path):
    """PNDMScheduler, Stable Diffusion v1's own, with the noise schedule of the pipeline's scheduler."""
    from diffusers import PNDMScheduler

    return _load(PNDMScheduler, folder, "scheduler")


def load_noise_scheduler(folder: Path):
    """DDPMScheduler with the noise schedule of the pipeline's own scheduler."""
    with quiet_libraries():
        from diffusers import DDPMScheduler

    return _load(DDPMScheduler, folder, "scheduler")
