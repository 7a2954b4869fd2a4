"""A pipeline folder as it lies there, read once: its configurations, and its weight files by their headers alone."""

import math
import os
import pickle
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from utils.errors import UserError, first_line
from utils.files.atomic import STAGING_PREFIX
from utils.files.json_files import read_json
from utils.files.ownership import HOLDER_FILE, LOCK_FILE, RUN_NAMES

FROZEN_PARTS = ("feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "vae")
MODEL_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")  # what an image depends on
UNET_STEM = "diffusion_pytorch_model"
MODEL_INDEX = "model_index.json"
CONFIG_FILES = {part: f"{part}/config.json" for part in ("unet", "vae", "text_encoder")}
CONFIG_FILES["scheduler"] = "scheduler/scheduler_config.json"
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


class TensorEntry(NamedTuple):
    """What a header says of a tensor."""

    dtype: str  # "F32", "F16", ...
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The files of one part that hold the weights that are loaded, one or all shards in their order.

    `files` are {file: {tensor: dtype and shape}}.
    """

    part: str
    files: dict[Path, dict[str, TensorEntry]]

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Of all files."""
        return {name: entry for entries in self.files.values() for name, entry in entries.items()}

    @property
    def save_dtype(self) -> str:
        """In which copies of such weights are saved: fp16 as they are, every other as fp32."""
        return "fp16" if next(iter(self.tensors.values())).dtype == "F16" else "fp32"

    @property
    def plain_names(self) -> dict[str, Path]:
        """{the name under which every version of the libraries loads it: file}."""
        paths, path = list(self.files), Path(self._plain)
        if len(paths) == 1:
            return {path.name: paths[0]}
        of_all = f"of-{len(paths):05d}{path.suffix}"
        return {f"{path.stem}-{number:05d}-{of_all}": shard for number, shard in enumerate(paths, 1)}

    @property
    def index(self) -> dict[str, dict[str, Any]]:
        """{name of a file: which shard, by its plain name, holds which tensor}; empty for one file."""
        if len(self.files) == 1:
            return {}
        total = sum(path.stat().st_size for path in self.files)
        weight_map = {tensor: name for name, path in self.plain_names.items() for tensor in self.files[path]}
        return {f"{self._plain}.index.json": dict(metadata=dict(total_size=total), weight_map=weight_map)}

    @property
    def _plain(self) -> str:
        suffix = next(iter(self.files)).suffix
        return f"{(BIN_STEMS if suffix == '.bin' else WEIGHT_STEMS)[self.part]}{suffix}"


@dataclass(frozen=True)
class BaseModel:
    """What a pipeline folder's files say, read once by `read_base`.

    Attributes:
        index: model_index.json.
        configs: of unet, vae, text_encoder and scheduler.
        weights: of unet, vae and text_encoder, and of safety_checker if the index names one that is there.
    """

    folder: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    weights: dict[str, Weights]

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon, or v_prediction."""
        return self.configs["scheduler"].get("prediction_type") or "epsilon"

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent is wide and high."""
        return 2 ** (len(self.configs["vae"].get("block_out_channels") or [64]) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the UNet was made for."""
        return in_pixels(self.configs["unet"].get("sample_size"), self.vae_scale_factor)

    @property
    def num_parameters(self) -> int:
        """The UNet's."""
        return sum(math.prod(entry.shape) for entry in self.weights["unet"].tensors.values())

    @property
    def save_dtype(self) -> str:
        """The UNet's."""
        return self.weights["unet"].save_dtype


def read_base(folder: Path) -> BaseModel:
    """Reads a pipeline folder. Raises UserError naming a file that is missing or damaged."""
    index = read_json(folder / MODEL_INDEX)
    configs = {part: read_json(folder / name) for part, name in CONFIG_FILES.items()}
    parts = ["unet", "vae", "text_encoder"]
    if (index.get("safety_checker") or [None])[0] and (folder / "safety_checker").is_dir():
        parts.append("safety_checker")
    return BaseModel(folder, index, configs, {part: find_weights(folder, part) for part in parts})


def in_pixels(sample_size: int | list[int] | None, scale_factor: int) -> tuple[int, int]:
    """(height, width) of a UNet's sample_size, which counts latents."""
    sample_size = sample_size or DEFAULT_SAMPLE_SIZE
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height * scale_factor, width * scale_factor


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
    is_bin: bool
    variant: str  # "" for the plain weights
    shard: int | None  # from 1
    num_shards: int

    @classmethod
    def of(cls, path: Path, part: str) -> "WeightFile | None":
        """None if it is no weight file of that part; .fp16-00001-of-00002 and -00001-of-00002.fp16 are the same."""
        for is_bin, stem, suffix in ((False, WEIGHT_STEMS[part], "safetensors"), (True, BIN_STEMS[part], "bin")):
            found = re.fullmatch(rf"{stem}(\.\w+)?(?:-(\d+)-of-(\d+))?(\.\w+)?\.{suffix}", path.name)
            if found:
                variant = ((found[1] or "") + (found[4] or "")).strip(".")
                return cls(path, is_bin, variant, int(found[2]) if found[2] else None, int(found[3] or 1))
        return None


def find_weights(folder: Path, part: str) -> Weights:
    """Those of one part of a pipeline.

    Plain weights before variants, safetensors before .bin, one file before shards, whatever an index says that was
    left beside them. Raises UserError if there are none, if one is unreadable, cut short or a git-lfs pointer, or if
    a shard is missing.
    """
    found = [WeightFile.of(path, part) for path in (folder / part).glob("*")]
    files = [file for file in found if file is not None]
    if not files:
        name = f"{WEIGHT_STEMS[part]}.safetensors"
        raise UserError(f"{folder / part} holds no weights ({name}); copy or download it again")
    best = min(files, key=lambda file: ((*VARIANTS, file.variant).index(file.variant), file.variant, file.is_bin))
    files = [file for file in files if (file.variant, file.is_bin) == (best.variant, best.is_bin)]
    paths = [file.path for file in files if file.shard is None] or _all_shards(files)
    if best.is_bin and len(paths) > 1 and WEIGHT_STEMS[part] == UNET_STEM:
        raise UserError(
            f"{paths[0]} is one of {len(paths)} shards, which diffusers loads as safetensors alone; convert them"
        )
    return Weights(part, {path: tensor_entries(path) for path in paths})


def _all_shards(files: list[WeightFile]) -> list[Path]:
    """Shards 1 to n of the largest n that is whole; of the first n, with the files that are not there, if none is."""
    sets: dict[int, dict[int, Path]] = {}
    for file in files:
        sets.setdefault(file.num_shards, {})[file.shard or 0] = file.path
    count = max(sets, key=lambda count: (len(sets[count]) == count, count))
    some = next(iter(sets[count].values()))
    names = [re.sub(r"-\d+-of-", f"-{number:05d}-of-", some.name) for number in range(1, count + 1)]
    return [sets[count].get(number, some.with_name(name)) for number, name in enumerate(names, 1)]


def loaded_files(folder: Path) -> list[str]:
    """Names of a component's files, less those that loading passes over: variants, .bin beside .safetensors."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    if folder.name in WEIGHT_STEMS:
        others = [path for path in files if path.suffix not in WEIGHT_SUFFIXES and not is_index(path)]
        files = others + list(find_weights(folder.parent, folder.name).files)
    return sorted(path.name for path in files)


def is_index(path: Path) -> bool:
    """Whether the file says which shards hold which tensors."""
    return ".index." in path.name and path.suffix == ".json"


def part_files(base: BaseModel, part: str) -> dict[str, Path]:
    """What a result takes from a part: {name in the part's folder: file}; the weights under their plain names."""
    weights = base.weights.get(part)
    found = {}
    for path in sorted((base.folder / part).rglob("*")):
        is_other = weights is not None and (path.suffix in WEIGHT_SUFFIXES or is_index(path))
        if path.is_file() and not path.name.startswith(".") and not is_other:
            found[str(path.relative_to(base.folder / part))] = path
    return found | (weights.plain_names if weights else {})


def tensor_entries(path: Path) -> dict[str, TensorEntry]:
    """{name: dtype and shape} of the tensors in a weight file. Raises UserError if it is damaged, or a pointer."""
    check_file(path)
    entries = safetensors_header(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not entries:
        raise UserError(f"{path} is not a file of weights (there is none in it); copy or download it again")
    return entries


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """{tensor name: its entry}; reads nothing but the header, without torch.

    Raises UserError if the file is shorter or longer than its header says, or the header contradicts itself.
    """
    try:
        with safe_open(path, "numpy") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorEntry(each.get_dtype(), tuple(each.get_shape())) for name, each in entries.items()}
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{path} is not a whole safetensors file ({reason}); copy or download it again") from None


def _read_pickle(path: Path) -> dict[str, TensorEntry]:
    refuse_unsafe_pickle(path)
    import torch  # only for .bin files: its import takes longer than all the checks

    dtypes = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        return {name: TensorEntry(dtypes.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a file of weights ({first_line(error)}); copy or download it again") from None


def refuse_unsafe_pickle(path: Path) -> None:
    """Raises UserError if this version of torch cannot read pickles safely."""
    if torch_version() < FIRST_SAFE_TORCH:
        raise UserError(
            f"{path} is a pickle, which this version of torch cannot read safely (CVE-2025-32434); install "
            f"torch 2.6 or newer, or convert the file to safetensors"
        )


def torch_version() -> tuple[int, int]:
    """Major and minor version of the installed torch, without importing it."""
    major, minor = metadata.version("torch").split(".")[:2]
    return int(major), int(minor)
