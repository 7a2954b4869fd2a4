"""The files of a pipeline folder as they lie there: JSON objects, and weights by their headers alone."""

import math
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files.safetensors_files import SAFETENSORS_DTYPES, safetensors_dtype, safetensors_header

WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FIRST_SAFE_TORCH = (2, 6)  # before, torch.load(weights_only=True) could be made to run code (CVE-2025-32434)
LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path, part: str) -> list[Path]:
    """The weight files of one part of a pipeline.

    Raises UserError where there is none, and where one is unreadable, cut short or a git-lfs pointer.
    """
    stem = WEIGHT_STEMS[part]
    found = sorted(p for s in ("safetensors", "bin") for p in (folder / part).glob(f"{stem}*.{s}"))
    found += sorted((folder / part).glob("pytorch_model*.bin")) if part == "text_encoder" else []
    if not found:
        raise UserError(f"{folder / part} holds no weights ({stem}.safetensors); copy or download it again")
    if not any(path.suffix == ".safetensors" for path in found) and torch_version() < FIRST_SAFE_TORCH:
        raise UserError(
            f"{found[0]} is a pickle, which this version of torch cannot read safely (CVE-2025-32434); install "
            f"torch 2.6 or newer, or convert the file to safetensors"
        )
    for path in found:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; copy or download the whole pipeline again")
        try:
            with path.open("rb") as file:
                start = file.read(len(LFS_POINTER))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); copy or download it again") from None
        if start == LFS_POINTER:
            raise UserError(
                f"{path} is a git-lfs pointer, not the weights; run 'git lfs install && git lfs pull' in {folder}"
            )
        if path.suffix == ".safetensors":
            safetensors_dtype(path)
    return found


def torch_version() -> tuple[int, int]:
    """Major and minor version of the installed torch, without importing it."""
    major, minor = metadata.version("torch").split(".")[:2]
    return int(major), int(minor)


def has_only_fp16_variants(part_folder: Path) -> bool:
    """Whether every weight file of a part is an fp16 variant, as in diffusion_pytorch_model.fp16.safetensors."""
    names = [path.name for path in part_folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    return bool(names) and all(".fp16." in name for name in names)


def default_save_dtype(unet_weights: list[Path]) -> str:
    """fp16 where the UNet file that is loaded holds float16, else fp32.

    As diffusers chooses: fp16 variants only where there is nothing else, safetensors before .bin.
    """
    plain = [path for path in unet_weights if ".fp16." not in path.name] or unet_weights
    path = next((path for path in plain if path.suffix == ".safetensors"), plain[0])
    if path.suffix == ".safetensors":
        return SAFETENSORS_DTYPES.get(safetensors_dtype(path), "fp32")
    import pickle

    import torch

    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        return "fp16" if next(iter(tensors.values())).dtype == torch.float16 else "fp32"
    except (OSError, RuntimeError, EOFError, StopIteration, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or "there is none in it"
        raise UserError(f"{path} is not a file of weights ({reason}); copy or download it again") from None


MODEL_INDEX = "model_index.json"


class BaseModel(NamedTuple):
    """What the base folder's configuration files say."""

    folder: Path
    vae_scale_factor: int
    unet_weights: list[Path]


def num_parameters(base: BaseModel) -> int:
    """The UNet's, from the header of a weight file; from its size where it is a pickle."""
    plain = [path for path in weight_files(base.folder, "unet") if "fp16" not in path.name and "ema" not in path.name]
    path = (plain or base.unet_weights)[0]
    if path.suffix == ".safetensors":
        return sum(math.prod(entry["shape"]) for entry in safetensors_header(path).values())
    return path.stat().st_size // 4


FROZEN_PARTS = ("feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "vae")


UNET_STEM = "diffusion_pytorch_model"
