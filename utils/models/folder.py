"""The files of a pipeline folder as they lie there: configurations, and weights by their headers alone."""

import math
import os
import pickle
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, first_line
from utils.files.json_files import read_json
from utils.files.safetensors_files import SAFETENSORS_DTYPES, safetensors_dtype, safetensors_header

FROZEN_PARTS = ("feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "vae")
UNET_STEM = "diffusion_pytorch_model"
MODEL_INDEX = "model_index.json"
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "safety_checker": "model",
}
FIRST_SAFE_TORCH = (2, 6)  # before, torch.load(weights_only=True) could be made to run code (CVE-2025-32434)
VARIANTS = (".fp16.", ".bf16.", ".non_ema.")  # weights beside the plain ones
LFS_POINTER = b"version https://git-lfs"
DEFAULT_SAMPLE_SIZE = 64  # of Stable Diffusion v1, whose first configurations leave it out


class BaseModel(NamedTuple):
    """What the base folder's configuration files say."""

    folder: Path
    vae_scale_factor: int
    unet_weights: list[Path]


def check_file(path: Path) -> None:
    """Raises UserError unless `path` can be read and is the file itself, not git-lfs's pointer to it."""
    if not os.path.lexists(path):
        raise UserError(f"{path} is missing; copy or download the whole pipeline again")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; copy or download the whole pipeline again")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy or download it again") from None
    if start == LFS_POINTER:
        raise UserError(
            f"{path} is a git-lfs pointer, not the file; run 'git lfs install && git lfs pull' in {path.parent.parent}"
        )
    if not start:
        raise UserError(f"{path} is empty; copy or download it again")


def weight_files(folder: Path, part: str) -> list[Path]:
    """The weight files of one part of a pipeline, variants and both formats.

    Raises UserError if there is none, if one is unreadable, cut short or a git-lfs pointer, or if a shard is missing.
    """
    stem = WEIGHT_STEMS[part]
    bin_stem = "pytorch_model" if stem == "model" else stem
    names = (f"{stem}*.safetensors", f"{bin_stem}*.bin")
    found = sorted(path for name in names for path in (folder / part).glob(name))
    index = folder / part / f"{stem}.safetensors.index.json"
    if index.is_file() and not (folder / part / f"{stem}.safetensors").is_file():
        found = sorted({*found, *_shards(index)})
    if not found:
        raise UserError(f"{folder / part} holds no weights ({stem}.safetensors); copy or download it again")
    for path in found:
        check_file(path)
        if path.suffix == ".safetensors":
            safetensors_header(path)
    return found


def _shards(index: Path) -> set[Path]:
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index} does not say which files hold the weights; copy or download it again")
    return {index.parent / name for name in names}


def loaded_weights(paths: list[Path]) -> list[Path]:
    """Those of a part's weight files that diffusers loads: fp16 variants only if there is nothing else, and
    safetensors rather than .bin."""
    own = [path for path in paths if not any(name in path.name for name in VARIANTS[1:])]
    plain = [path for path in own if ".fp16." not in path.name] or own or paths
    return [path for path in plain if path.suffix == ".safetensors"] or plain


def variant(*part_folders: Path) -> str | None:
    """The variant to ask diffusers for: fp16 if one of the folders holds weights of that variant only."""
    for folder in part_folders:
        names = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
        if names and all(".fp16." in name for name in names):
            return "fp16"
    return None


def refuse_unsafe_pickles(paths: list[Path]) -> None:
    """Raises UserError if a part's weights are pickles only and this torch cannot read them safely."""
    if not any(path.suffix == ".safetensors" for path in paths) and torch_version() < FIRST_SAFE_TORCH:
        raise UserError(
            f"{paths[0]} is a pickle, which this version of torch cannot read safely (CVE-2025-32434); install "
            f"torch 2.6 or newer, or convert the file to safetensors"
        )


def torch_version() -> tuple[int, int]:
    """Major and minor version of the installed torch, without importing it."""
    major, minor = metadata.version("torch").split(".")[:2]
    return int(major), int(minor)


def default_save_dtype(unet_weights: list[Path]) -> str:
    """fp16 if the UNet file that is loaded holds float16, else fp32."""
    path = loaded_weights(unet_weights)[0]
    if path.suffix == ".safetensors":
        return SAFETENSORS_DTYPES.get(safetensors_dtype(path) or "F32", "fp32")
    import torch  # only for .bin files: its import takes longer than all the checks

    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        return "fp16" if next(iter(tensors.values())).dtype == torch.float16 else "fp32"
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a file of weights ({first_line(error)}); copy or download it again") from None
    except StopIteration:
        raise UserError(f"{path} is not a file of weights (there is none in it); copy or download it again") from None


def num_parameters(base: BaseModel) -> int:
    """The UNet's, from the headers of its weight files; from their sizes if they are pickles."""
    paths = loaded_weights(base.unet_weights)
    if paths[0].suffix == ".safetensors":
        return sum(math.prod(entry["shape"]) for path in paths for entry in safetensors_header(path).values())
    return sum(path.stat().st_size for path in paths) // 4


def prediction_type(folder: Path) -> str:
    """What the folder's UNet predicts: epsilon, or v_prediction."""
    return read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type") or "epsilon"


def vae_scale_factor(folder: Path) -> int:
    """Pixels a latent is wide and high."""
    return 2 ** (len(read_json(folder / "vae" / "config.json").get("block_out_channels") or [64]) - 1)


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) in pixels that the folder's UNet was made for."""
    sample_size = read_json(folder / "unet" / "config.json").get("sample_size")
    return in_pixels(sample_size, vae_scale_factor(folder))


def in_pixels(sample_size: int | list[int] | None, scale_factor: int) -> tuple[int, int]:
    """(height, width) of a UNet's sample_size, which counts latents."""
    sample_size = sample_size or DEFAULT_SAMPLE_SIZE
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height * scale_factor, width * scale_factor
