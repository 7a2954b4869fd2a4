"""A pipeline folder as it lies there, read once: its configurations, and its weight files by their headers alone."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.files.atomic import STAGING_PREFIX
from utils.files.json_files import read_json
from utils.files.ownership import HOLDER_FILE, LOCK_FILE, RUN_NAMES
from utils.models.weight_files import PICKLE, TensorEntry, is_there, kind_of, tensor_entries

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
BIN_STEMS = WEIGHT_STEMS | {"text_encoder": "pytorch_model", "safety_checker": "pytorch_model"}
VARIANTS = ("", "fp16", "bf16", "non_ema")  # the first that a folder holds is loaded
PREPROCESSOR = "preprocessor_config.json"
SMALL_FILES = {  # what is read of a part beside its weights; config.json of those that are not here
    "feature_extractor": (PREPROCESSOR,),
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    + ("added_tokens.json",),
}
DEFAULT_SAMPLE_SIZE = 64  # of Stable Diffusion v1, whose first configurations leave it out


def is_reserved(name: str) -> bool:
    """Whether an output folder holds something of the program's own under that name, be it in other letters."""
    name, reserved = name.lower(), (*FROZEN_PARTS, "unet", MODEL_INDEX, LOCK_FILE, HOLDER_FILE, *RUN_NAMES)
    return name in reserved or name.startswith(("checkpoint-", STAGING_PREFIX))


@dataclass(frozen=True)
class Weights:
    """The files of one part that hold the weights that are loaded, one or all shards in their order.

    `files` are {file: {tensor: dtype and shape}}; `kind` is SAFETENSORS or PICKLE, by what is in them.
    """

    part: str
    files: dict[Path, dict[str, TensorEntry]]
    kind: str

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
        return f"{(BIN_STEMS if self.kind == PICKLE else WEIGHT_STEMS)[self.part]}.{self.kind}"


@dataclass(frozen=True)
class BaseModel:
    """What a pipeline folder's files say, read once by `read_base`.

    Attributes:
        index: model_index.json.
        configs: of unet, vae, text_encoder and scheduler, whose class is the index's: it is the one that is loaded.
        weights: of unet, vae and text_encoder, and of safety_checker if the index names one that can be loaded.
        no_checker: why it cannot be.
    """

    folder: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    weights: dict[str, Weights]
    no_checker: str = "its model_index.json names none"

    def files(self, part: str) -> dict[str, Path]:
        """What is read of a part, and goes into a result: {name there: file}."""
        is_left_out = part == "safety_checker" and part not in self.weights
        return {} if is_left_out else part_files(self.folder, part, self.weights.get(part))

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon, or v_prediction."""
        return self.configs["scheduler"].get("prediction_type") or "epsilon"

    @property
    def text_layers(self) -> tuple[int, int]:
        """Of the text encoder: how many its configuration uses, and how many its weights have."""
        there = count(self.weights["text_encoder"].tensors, r".*encoder\.layers\.(\d+)\.")
        return self.configs["text_encoder"].get("num_hidden_layers", there), there

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
    if isinstance(named := index.get("scheduler"), list) and len(named) == 2:
        configs["scheduler"]["_class_name"] = named[1]
    weights = {part: find_weights(folder, part) for part in ("unet", "vae", "text_encoder")}
    if not (index.get("safety_checker") or [None])[0]:
        return BaseModel(folder, index, configs, weights)
    try:  # nothing is trained or drawn with it, and a result is whole without it
        for part, name in (("safety_checker", "config.json"), ("feature_extractor", PREPROCESSOR)):
            read_json(folder / part / name)
        weights["safety_checker"] = find_weights(folder, "safety_checker")
    except UserError as error:
        return BaseModel(folder, index, configs, weights, str(error))
    return BaseModel(folder, index, configs, weights)


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number at that place of a name."""
    found = (re.match(pattern, name) for name in names)
    return 1 + max((int(number[1]) for number in found if number), default=-1)


def in_pixels(sample_size: int | list[int] | None, scale_factor: int) -> tuple[int, int]:
    """(height, width) of a UNet's sample_size, which counts latents."""
    sample_size = sample_size or DEFAULT_SAMPLE_SIZE
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height * scale_factor, width * scale_factor


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

    What is there before git-lfs's pointers, plain weights before variants, safetensors before .bin, one file before
    shards, whatever an index says that was left beside them. Raises UserError if there are none, if one is
    unreadable, cut short or a git-lfs pointer, or if a shard is missing.
    """
    found = [WeightFile.of(path, part) for path in (folder / part).glob("*")]
    named = [file for file in found if file is not None]
    if not named:
        said = f"{folder / part} holds no weights ({WEIGHT_STEMS[part]}.safetensors)"
        for path in (folder / part).glob("*.[mo][sn][gn]*"):
            said += f", but {path.name}, which only Flax or ONNX reads"
        raise UserError(f"{said}; copy or download it again")
    files = [file for file in named if is_there(file.path)] or named
    best = min(files, key=lambda file: ((*VARIANTS, file.variant).index(file.variant), file.variant, file.is_bin))
    files = [file for file in files if (file.variant, file.is_bin) == (best.variant, best.is_bin)]
    paths = _of_one_set(files)
    weights = Weights(part, {path: tensor_entries(path) for path in paths}, kind_of(paths[0]))
    if len(paths) > 1 and weights.kind == PICKLE and WEIGHT_STEMS[part] == UNET_STEM:
        raise UserError(
            f"{paths[0]} is one of {len(paths)} shards, which diffusers loads as safetensors alone; convert them"
        )
    return weights


def _of_one_set(files: list[WeightFile]) -> list[Path]:
    """The one file; else shards 1 to n of the largest n that is whole; of the first n, with what is not there."""
    if whole := [file.path for file in files if file.shard is None]:
        return whole
    sets: dict[int, dict[int, Path]] = {}
    for file in files:
        sets.setdefault(file.num_shards, {})[file.shard or 0] = file.path
    count = max(sets, key=lambda count: (len(sets[count]) == count, count))
    some = next(iter(sets[count].values()))
    names = [re.sub(r"-\d+-of-", f"-{number:05d}-of-", some.name) for number in range(1, count + 1)]
    return [sets[count].get(number, some.with_name(name)) for number, name in enumerate(names, 1)]


def part_files(folder: Path, part: str, weights: Weights | None = None) -> dict[str, Path]:
    """All that is read of a part, {the name by which it is loaded: file}; whatever else lies there is passed over."""
    names = SMALL_FILES.get(part, ("config.json",))
    found = {name: path for name in names if (path := folder / part / name).is_file()}
    return found | ((weights or find_weights(folder, part)).plain_names if part in WEIGHT_STEMS else {})
