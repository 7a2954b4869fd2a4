"""The base pipeline's parts, loaded from a local folder and nowhere else."""

import contextlib
import os
import warnings
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


@contextlib.contextmanager
def quiet_libraries():
    """Only errors from diffusers and transformers: their loading notes are about options this program does not have."""
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


def _load(cls, folder: Path, part: str, **options):
    with quiet_libraries():
        return cls.from_pretrained(folder, subfolder=part, local_files_only=True, **options)


def _load_frozen(cls, folder: Path, part: str, weight_dtype: torch.dtype, device) -> torch.nn.Module:
    module = _load(cls, folder, part, **_variant(folder, part)).requires_grad_(False).eval()
    with quiet_libraries():
        return module.to(device, dtype=weight_dtype)


def _variant(folder: Path, part: str) -> dict:
    """Asks for the fp16 files where a part has no others."""
    names = [path.name for path in (folder / part).glob("*") if path.suffix in (".safetensors", ".bin")]
    return {"variant": "fp16"} if names and all(".fp16." in name for name in names) else {}


def load_tokenizer(folder: Path, tokenizer_name: str | None = None):
    """CLIPTokenizer from `tokenizer_name` (a folder), else from the pipeline's tokenizer/."""
    from transformers import CLIPTokenizer

    if tokenizer_name:
        return CLIPTokenizer.from_pretrained(tokenizer_name, local_files_only=True)
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
    from diffusers import AutoencoderKL

    return _load_frozen(AutoencoderKL, folder, "vae", weight_dtype, device)


def load_unet(folder: Path) -> torch.nn.Module:
    """UNet2DConditionModel in training mode, float32 on the CPU: FlatParameters takes it from there."""
    from diffusers import UNet2DConditionModel

    return _load(UNet2DConditionModel, folder, "unet", **_variant(folder, "unet")).train()


def load_noise_scheduler(folder: Path):
    """DDPMScheduler with the noise schedule of the pipeline's own scheduler."""
    from diffusers import DDPMScheduler

    return _load(DDPMScheduler, folder, "scheduler")
