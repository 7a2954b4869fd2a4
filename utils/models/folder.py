"""The files of a pipeline folder as they lie there: configurations, and weights by their headers alone."""

import contextlib
import math
import os
import pickle
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, first_line
from utils.files.atomic import STAGING_PREFIX
from utils.files.json_files import read_json
from utils.files.ownership import HOLDER_FILE, LOCK_FILE, RUN_NAMES
from utils.files.safetensors_files import SAFETENSORS_DTYPES, safetensors_dtype, safetensors_header
from utils.models.layout import unet_shapes

FROZEN_PARTS = ("feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "vae")
MODEL_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")  # what an image depends on
UNET_STEM = "diffusion_pytorch_model"
MODEL_INDEX = "model_index.json"
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "safety_checker": "model",
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".msgpack", ".h5", ".onnx")
FIRST_SAFE_TORCH = (2, 6)  # before, torch.load(weights_only=True) could be made to run code (CVE-2025-32434)
BIN_STEMS = WEIGHT_STEMS | {"text_encoder": "pytorch_model", "safety_checker": "pytorch_model"}
VARIANTS = ("", "fp16", "bf16", "non_ema")  # the first that a folder holds is loaded
LFS_POINTER = b"version https://git-lfs"
DEFAULT_SAMPLE_SIZE = 64  # of Stable Diffusion v1, whose first configurations leave it out


def is_reserved(name: str) -> bool:
    """Whether an output folder holds something of the program's own under that name, be it in other letters."""
    name, reserved = name.lower(), (*FROZEN_PARTS, "unet", MODEL_INDEX, LOCK_FILE, HOLDER_FILE, *RUN_NAMES)
    return name in reserved or name.startswith(("checkpoint-", STAGING_PREFIX))


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


class WeightFile(NamedTuple):
    """What the name of a weight file says: of which kind it is, and which shard."""

    path: Path
    variant: str  # "" for the plain weights
    shard: int | None  # from 1
    num_shards: int | None

    @classmethod
    def of(cls, path: Path, part: str) -> "WeightFile | None":
        """None if it is no weight file of that part; .fp16-00001-of-00002 and -00001-of-00002.fp16 are the same."""
        for stem, suffix in ((WEIGHT_STEMS[part], "safetensors"), (BIN_STEMS[part], "bin")):
            found = re.fullmatch(rf"{stem}(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.{suffix}", path.name)
            if found:
                numbers = re.findall(r"\d+", found[2] or "") or (None, None)
                shard, count = (int(number) if number else None for number in numbers)
                return cls(path, ((found[1] or "") + (found[3] or "")).strip("."), shard, count)
        return None


def weight_files(folder: Path, part: str) -> list[Path]:
    """The files of one part of a pipeline that hold the weights that are loaded: one, or all shards in their order.

    Plain weights before variants, safetensors before .bin, one file before shards, whatever an index says that was
    left beside them. Raises UserError if there are none, if one is unreadable, cut short or a git-lfs pointer, or if
    a shard is missing.
    """
    found = [WeightFile.of(path, part) for path in (folder / part).glob("*")]
    files = [file for file in found if file is not None]
    kinds = sorted({(_rank(file.variant), file.variant, file.path.suffix != ".safetensors") for file in files})
    for _, variant, is_bin in kinds:
        of_kind = [file for file in files if (file.variant, file.path.suffix == ".bin") == (variant, is_bin)]
        paths = [file.path for file in of_kind if file.shard is None] or _all_shards(of_kind)
        if is_bin and len(paths) > 1 and WEIGHT_STEMS[part] == UNET_STEM:
            raise UserError(
                f"{paths[0]} is one of {len(paths)} shards, which diffusers loads as safetensors alone; convert them"
            )
        for path in paths:
            check_file(path)
            if path.suffix == ".safetensors":
                safetensors_header(path)
        return paths
    for index in sorted((folder / part).glob(f"{WEIGHT_STEMS[part]}.safetensors.index*.json")):
        check_file(min(_named_in(index)))  # raises: none of them is there
    raise UserError(f"{folder / part} holds no weights ({WEIGHT_STEMS[part]}.safetensors); copy or download it again")


def loaded_files(folder: Path) -> list[str]:
    """Names of a component's files, less those that loading passes over: variants, .bin beside .safetensors."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    if folder.name in WEIGHT_STEMS:
        others = [path for path in files if path.suffix not in WEIGHT_SUFFIXES and not is_index(path)]
        files = others + weight_files(folder.parent, folder.name)
    return sorted(path.name for path in files)


def _rank(variant: str) -> int:
    return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)


def _all_shards(files: list[WeightFile]) -> list[Path]:
    """Shards 1 to n of the largest n that is whole; of the first n, with the files that are not there, if none is."""
    counts = sorted({file.num_shards or 0 for file in files}, reverse=True)
    sets = {count: {f.shard: f.path for f in files if f.num_shards == count} for count in counts}
    count = next((count for count in counts if len(sets[count]) == count), counts[0])
    some = next(iter(sets[count].values()))
    there = re.compile(r"-(\d+)-of-")
    width = len(re.findall(there, some.name)[0])
    names = {number: there.sub(f"-{number:0{width}d}-of-", some.name) for number in range(1, count + 1)}
    return [sets[count].get(number, some.with_name(name)) for number, name in names.items()]


def _named_in(index: Path) -> set[Path]:
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index} does not say which files hold the weights; copy or download it again")
    return {index.parent / name for name in names}


def is_index(path: Path) -> bool:
    """Whether the file says which shards hold which tensors."""
    return ".index." in path.name and path.suffix == ".json"


def plain_names(folder: Path, part: str) -> tuple[dict[str, Path], dict | None]:
    """The weights of a part under the names that every version of the libraries loads: {name: file}, and the index.

    The index of shards is None for one file.
    """
    paths = weight_files(folder, part)
    suffix = paths[0].suffix
    stem = WEIGHT_STEMS[part] if suffix == ".safetensors" else BIN_STEMS[part]
    if len(paths) == 1:
        return {f"{stem}{suffix}": paths[0]}, None
    names = {f"{stem}-{number:05d}-of-{len(paths):05d}{suffix}": path for number, path in enumerate(paths, 1)}
    total = sum(path.stat().st_size for path in paths)
    weight_map = {tensor: name for name, path in names.items() for tensor in tensor_names(path)}
    return names, dict(metadata=dict(total_size=total), weight_map=weight_map)


def index_name(names: Iterable[str]) -> str:
    """Of the index that belongs to shards of these names."""
    first = min(names)
    return f"{first.partition('-0')[0]}{Path(first).suffix}.index.json"


def part_files(folder: Path, part: str) -> tuple[dict[str, Path], dict | None]:
    """What a result takes from a part: {name in the part's folder: file}, and the index of shards if there are some.

    Of weights those that are loaded, under their plain names.

    A safety checker, which training never loads, may lack its weights.
    """
    weights: dict[str, Path] = {}
    index = None
    if part in WEIGHT_STEMS:
        with contextlib.suppress(*((UserError,) if part == "safety_checker" else ())):
            weights, index = plain_names(folder, part)
    found = {}
    for path in sorted((folder / part).rglob("*")):
        is_other = bool(weights) and (path.suffix in WEIGHT_SUFFIXES or is_index(path))
        if path.is_file() and not path.name.startswith(".") and not is_other:
            found[str(path.relative_to(folder / part))] = path
    return found | weights, index


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a weight file."""
    return list(safetensors_header(path) if path.suffix == ".safetensors" else _read_pickle(path))


def _read_pickle(path: Path) -> dict:
    import torch  # only for .bin files: its import takes longer than all the checks

    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a file of weights ({first_line(error)}); copy or download it again") from None


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
    """fp16 if the UNet's file holds float16, else fp32."""
    path = unet_weights[0]
    if path.suffix == ".safetensors":
        return SAFETENSORS_DTYPES.get(safetensors_dtype(path) or "F32", "fp32")
    tensors = _read_pickle(path)
    try:
        return "fp16" if str(next(iter(tensors.values())).dtype) == "torch.float16" else "fp32"
    except (StopIteration, AttributeError):
        raise UserError(f"{path} is not a file of weights (there is none in it); copy or download it again") from None


def num_parameters(base: BaseModel) -> int:
    """The UNet's, however its weights are stored: its configuration says how many they are."""
    shapes = unet_shapes(read_json(base.folder / "unet" / "config.json"))
    return sum(math.prod(shape) for shape in shapes.values())


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
