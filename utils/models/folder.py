"""The files of a pipeline folder as they lie there: JSON objects, and weights by their headers alone."""

import json
import math
import struct
from importlib import metadata
from pathlib import Path

from utils.errors import UserError

WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SAFETENSORS_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "fp32", "F64": "fp32"}
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
FIRST_SAFE_TORCH = (2, 6)  # before, torch.load(weights_only=True) could be made to run code (CVE-2025-32434)
LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises UserError naming the file where it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy or download the whole pipeline again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; copy or download it again")
    return value


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


def safetensors_dtype(path: Path) -> str | None:
    """The dtype of the first tensor, as the header names it ("F32", "F16", ...); None where there is no tensor."""
    return next((entry["dtype"] for entry in safetensors_header(path).values()), None)


def safetensors_header(path: Path) -> dict[str, dict]:
    """{tensor name: {"dtype", "shape", "data_offsets"}} of a safetensors file; reads nothing but its header.

    Raises UserError where the file is shorter or longer than its header says, or the header contradicts itself.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(num_bytes, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if expected != num_bytes:
            raise ValueError(f"its header promises {expected} bytes, it has {num_bytes}")
        _check_offsets(tensors)
        return tensors
    except (ValueError, OverflowError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from None
    except (AttributeError, KeyError, IndexError, TypeError):
        raise UserError(f"{path} is not a safetensors file (its header lists no tensors); download it again") from None


def _check_offsets(tensors: dict[str, dict]) -> None:
    """Raises ValueError where tensors overlap, leave gaps, or have other sizes than their shapes say."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if any(type(side) is not int or side < 0 for side in entry["shape"]) or start != end:
            raise ValueError(f"its header contradicts itself at {name[:80]!r}")
        num_bytes = DTYPE_BYTES.get(entry["dtype"], 0) * math.prod(entry["shape"])
        if entry["dtype"] in DTYPE_BYTES and stop - start != num_bytes:
            raise ValueError(f"{name[:80]!r} has {stop - start} bytes, but its shape asks for {num_bytes}")
        end = stop


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
