"""A single checkpoint file as a pipeline folder: the inverse of single_file.py.

Configurations follow from the tensors' shapes, from what this program's exports say of themselves, and from a .yaml
beside the file; what none of them says is Stable Diffusion v1's. Nothing is downloaded, and no pickle is executed.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utils.errors import UserError, first_line
from utils.files.json_files import write_json
from utils.files.ownership import export_config
from utils.files.safetensors_files import safetensors_header
from utils.models import v1_config
from utils.models.check import check_config, check_fit
from utils.models.folder import MODEL_INDEX, WEIGHT_STEMS, refuse_unsafe_pickles
from utils.models.layout import SHAPES, WITH_ATTENTION, today_name
from utils.models.original_config import read_config
from utils.models.single_file import (
    CONFIG_KEY,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    original_text_name,
    original_unet_name,
    original_vae_name,
)

PREFIXES = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_PREFIX}
EMA_PREFIX = "model_ema."
TOKENIZER = Path(__file__).resolve().parents[2] / "model" / "tiny-stable-diffusion" / "tokenizer"  # CLIP's own
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WORDS = re.compile(
    r"transformer_blocks|middle_block|time_embed|in_layers|out_layers|emb_layers|skip_connection|proj_in|proj_out|proj"
    r"|attn[12]|to_q|to_k|to_v|to_out|ff|net|norm[123]|norm|conv|op|out|weight|bias|\d+"
)  # of the names of a UNet's tensors, in a row
PIXELS_PER_LATENT = 8  # of Stable Diffusion v1, a side
FRAMEWORK = "pytorch_lightning."  # whose classes the first checkpoints name beside their weights
# The start of a tensor's name: what a file is that is no Stable Diffusion v1.
OTHERS = {
    "conditioner.": "a Stable Diffusion XL checkpoint",
    "cond_stage_model.model.": "a Stable Diffusion 2 checkpoint",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA, which is a change of a model and no model",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "model.diffusion_model.double_blocks.": "a Flux checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "text_encoders.": "a checkpoint of a newer architecture",
    "emb_params": "a learned token (textual inversion)",
    "string_to_param": "a learned token (textual inversion)",
}


class Checkpoint(NamedTuple):
    """The tensors of a single file, read when they are asked for, and what it says of itself."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    pickled: Mapping[str, torch.Tensor] | None

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Raises UserError if the file is no file of weights, or cannot be read without running code from it."""
        if path.suffix == ".safetensors":
            header = safetensors_header(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return cls(path, {name: tuple(entry["shape"]) for name, entry in header.items()}, metadata, None)
        refuse_unsafe_pickles([path])
        tensors = _read_pickle(path)
        return cls(path, {name: tuple(value.shape) for name, value in tensors.items()}, {}, tensors)

    def read(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """{new name: tensor} of {new name: name in the file}."""
        if self.pickled is not None:
            return {new: self.pickled[name] for new, name in names.items()}
        with safe_open(self.path, "pt") as file:
            return {new: file.get_tensor(name) for new, name in names.items()}


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    options: dict[str, Any] = dict(map_location="cpu", weights_only=True)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = [name for name in unknown if not name.startswith(FRAMEWORK)]
        if foreign:
            raise UserError(
                f"{path} holds more than weights: reading it would run {foreign[0]}, which is not done; convert it to "
                f"safetensors if you trust it, or take a copy in that format"
            )
        # An empty class stands for each of the framework's, which are names beside the weights and are never used.
        known: list = [(type("Unused", (), {}), name) for name in unknown]
        with torch.serialization.safe_globals(known):
            loaded = torch.load(path, **options)
    except UserError:
        raise
    except Exception as error:  # damaged pickles fail in many ways, and every one is about the file
        raise UserError(f"{path} is not a file of weights ({first_line(error)}); copy or download it again") from None
    found = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {
        name: value for name, value in found.items() if isinstance(value, torch.Tensor) and isinstance(name, str)
    }
    if not tensors:
        raise UserError(f"{path} holds no weights; copy or download it again")
    return tensors


def import_single_file(path: Path, folder: Path) -> list[str]:
    """Writes the checkpoint `path` into the empty `folder` as a pipeline, each tensor as it is in the file.

    Returns what there is to say about it, a line each. Raises UserError if it is not a whole Stable Diffusion v1.
    """
    checkpoint = Checkpoint.open(path)
    _refuse_others(checkpoint)
    own, notes = _own_config(checkpoint), []
    names = {part: _names_in_file(checkpoint, part) for part in PREFIXES}
    configs = {part: _part_config(checkpoint, part, names[part]) | own.get(part, {}) for part in PREFIXES}
    check_fit(path, **configs)
    used: set[str] = set()
    for part in PREFIXES:
        used |= set(_write_part(checkpoint, part, names[part], configs[part], folder / part).values())
    scheduler = v1_config.SCHEDULER | own.get("scheduler", {})
    write_json(_made(folder / "scheduler") / "scheduler_config.json", scheduler)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    write_json(folder / MODEL_INDEX, v1_config.MODEL_INDEX)
    if scheduler["prediction_type"] != "epsilon":
        notes.append("it predicts velocity (v_prediction)")
    if not any(name.startswith(UNET_PREFIX) for name in checkpoint.shapes):
        notes.append("its UNet's weights are EMA's: it has no others")
    over = [name for name in checkpoint.shapes if name not in used and not name.endswith("position_ids")]
    if over:
        notes.append(f"{len(over)} tensors that a pipeline has no place for are left out, {over[0]} first")
    return notes


def import_vae(path: Path, folder: Path) -> list[str]:
    """Writes the VAE in the file `path`, by itself or in a checkpoint, into `folder`/vae. Raises UserError."""
    checkpoint = Checkpoint.open(path)
    names = _names_in_file(checkpoint, "vae")
    config = _part_config(checkpoint, "vae", names) | _own_config(checkpoint).get("vae", {})
    _write_part(checkpoint, "vae", names, config, folder / "vae")
    return []


def _refuse_others(checkpoint: Checkpoint) -> None:
    starts = (what for start, what in OTHERS.items() if any(name.startswith(start) for name in checkpoint.shapes))
    if what := next(starts, None):
        raise UserError(f"{checkpoint.path} is {what}; this program trains Stable Diffusion v1 (1.1 to 1.5)")


def _own_config(checkpoint: Checkpoint) -> dict[str, dict]:
    """{part: what is known of its configuration}, from the file's metadata and the .yaml beside it; this one wins."""
    try:
        found = json.loads(checkpoint.metadata.get(CONFIG_KEY) or "{}")
    except ValueError:
        found = {}
    own = {part: dict(found[part]) for part in (*PREFIXES, "scheduler") if isinstance(found.get(part), dict)}
    scheduler = own.setdefault("scheduler", {})
    size = re.fullmatch(r"(\d+)x\1", checkpoint.metadata.get("modelspec.resolution", ""))
    if size and not found:
        own.setdefault("unet", {})["sample_size"] = int(size[1]) // PIXELS_PER_LATENT
    if checkpoint.metadata.get("modelspec.prediction_type") in ("v", "v_prediction") or "v_pred" in checkpoint.shapes:
        scheduler["prediction_type"] = "v_prediction"
    params = read_config(export_config(checkpoint.path))
    if params:
        scheduler["prediction_type"] = "v_prediction" if params.get("parameterization") == "v" else "epsilon"
        if isinstance(params.get("scale_factor"), float):
            own.setdefault("vae", {})["scaling_factor"] = params["scale_factor"]
    return own


def _names_in_file(checkpoint: Checkpoint, part: str) -> dict[str, str]:
    """{original name without the part's prefix: name in the file} of one part's tensors."""
    prefix = PREFIXES[part]
    found = {name.removeprefix(prefix): name for name in checkpoint.shapes if name.startswith(prefix)}
    if part == "vae" and not found:  # a VAE by itself
        found = {
            name: name for name in checkpoint.shapes if name.startswith(("encoder.", "decoder.", "quant_", "post_"))
        }
        num_blocks = sum(name.endswith(".0.conv1.weight") and ".down_blocks." in name for name in found)
        if num_blocks:  # diffusers' names
            return {original_vae_name(today_name(part, name), num_blocks): full for name, full in found.items()}
    if part == "text_encoder":
        return {today_name(part, name): full for name, full in found.items()}
    if part == "unet" and not found:
        found = {_with_dots(name.removeprefix(EMA_PREFIX)): name for name in checkpoint.shapes if EMA_PREFIX in name}
    return found


def _with_dots(name: str) -> str:
    """The original name of a UNet's tensor from EMA's, "diffusion_modelinput_blocks10in_layers0weight"."""
    name = name.removeprefix("diffusion_model")
    block = re.fullmatch(r"(input_blocks|output_blocks)(\d+)(\d)(\D.*)", name)
    start, rest = ([block[1], block[2], block[3]], block[4]) if block else ([], name)
    return ".".join([*start, *WORDS.findall(rest)])


def _part_config(checkpoint: Checkpoint, part: str, names: Mapping[str, str]) -> dict[str, Any]:
    try:
        return v1_config.CONFIGS[part]({name: checkpoint.shapes[full] for name, full in names.items()})
    except (KeyError, IndexError, ValueError) as error:
        what = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}[part]
        raise UserError(
            f"{checkpoint.path} holds no whole {what} of Stable Diffusion v1 ({PREFIXES[part]}{first_line(error)} is "
            f"missing); give a file with UNet, VAE and text encoder"
        ) from None


def _write_part(
    checkpoint: Checkpoint, part: str, names: Mapping[str, str], config: dict[str, Any], folder: Path
) -> dict[str, str]:
    """Writes a part's configuration and weights. Returns {name in the folder: name in the file} of its tensors."""
    check_config(checkpoint.path, part, config)
    shapes = SHAPES[part](config)
    found = {name: names.get(_original_name(part, name, config)) for name in shapes}
    missing = [_original_name(part, name, config) for name, full in found.items() if full is None]
    if missing:
        raise UserError(
            f"{checkpoint.path} lacks {len(missing)} of its {part}'s {len(shapes)} tensors, "
            f"{PREFIXES[part]}{missing[0]} first; copy or download it again"
        )
    wanted = {name: full for name, full in found.items() if full is not None}
    tensors = {}
    for name, value in checkpoint.read(wanted).items():
        if value.dtype not in DTYPES:
            raise UserError(f"{checkpoint.path}: {wanted[name]} is {value.dtype}; give a file in float16 or float32")
        if value.numel() != math.prod(shapes[name]) or (value.dim() != len(shapes[name]) and part != "vae"):
            raise UserError(
                f"{checkpoint.path}: {wanted[name]} has shape {list(value.shape)}, but {list(shapes[name])} belongs "
                f"with its other tensors; copy or download it again"
            )
        tensors[_saved_name(part, name)] = value.reshape(shapes[name]).contiguous()
    write_json(_made(folder) / "config.json", config)
    save_file(tensors, folder / f"{WEIGHT_STEMS[part]}.safetensors", {"format": "pt"})
    return wanted


def _original_name(part: str, name: str, config: Mapping[str, Any]) -> str:
    if part == "text_encoder":
        return name
    if part == "vae":
        return original_vae_name(name, len(config["block_out_channels"]))
    attention = {number for number, kind in enumerate(config["up_block_types"]) if WITH_ATTENTION in kind}
    return original_unet_name(name, config["layers_per_block"], attention)


def _saved_name(part: str, name: str) -> str:
    return original_text_name(name) if part == "text_encoder" else name


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
