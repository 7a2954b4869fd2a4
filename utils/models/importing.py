"""A single checkpoint file as a pipeline folder, converted by diffusers: the inverse of single_file.py.

Configurations are Stable Diffusion v1's, in v1/, with the sizes that the tensors have and what the file's header says
(this program's exports say all). Nothing is downloaded, and no pickle is executed.
"""

import functools
import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from utils.runtime.libraries import quiet_libraries

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from utils.errors import UserError, first_line
from utils.files.json_files import read_json, write_json
from utils.models import single_file
from utils.models.check import check_config, check_fit
from utils.models.folder import CONFIG_FILES, MODEL_INDEX, WEIGHT_STEMS, count
from utils.models.single_file import CONFIG_KEY, PREDICTS_VELOCITY, PREFIXES, ZERO_TERMINAL_SNR
from utils.models.weight_files import Tensors, read_tensors

V1 = Path(__file__).with_name("v1")
TOKENIZER = Path(__file__).resolve().parents[2] / "model" / "tiny-stable-diffusion" / "tokenizer"  # CLIP's own
PARTS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
CLIP_SKIP = "the last layers of its text encoder, which its configuration does not use (clip skip),"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PIXELS_PER_LATENT = 8  # of Stable Diffusion v1, a side
CHANNELS_PER_HEAD = 64  # of CLIP
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
Shapes = Mapping[str, tuple[int, ...]]


def import_single_file(path: Path, folder: Path) -> list[str]:
    """Writes the checkpoint `path` into the empty `folder` as a pipeline, its values as they are in the file.

    Without a VAE, if there is none in it. Returns what there is to say about it, a line each. Raises UserError if it
    is no Stable Diffusion v1, or lacks some of a part.
    """
    tensors, metadata = _read(path)
    if what := next((what for start, what in OTHERS.items() if any(name.startswith(start) for name in tensors)), None):
        raise UserError(f"{path} is {what}; this program trains Stable Diffusion v1 (1.1 to 1.5)")
    said, parts = _said(tensors, metadata), {part: _part(path, part, tensors) for part in PARTS}
    parts = {part: found for part, found in parts.items() if found or part != "vae"}
    configs = {part: _config(path, part, found, said) for part, found in parts.items()}
    check_fit(path, **{"vae": {}} | configs)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    for part, found in parts.items():
        (folder / part).mkdir()
        _write_part(path, part, found, configs[part], folder)
    scheduler = _whole("scheduler", {}, said)
    (folder / "scheduler").mkdir()
    write_json(folder / CONFIG_FILES["scheduler"], scheduler)
    index = read_json(V1 / MODEL_INDEX) | dict(scheduler=["diffusers", scheduler["_class_name"]])
    write_json(folder / MODEL_INDEX, index)
    unused = [name for name in parts["text_encoder"] if not single_file.is_used_layer(name, configs["text_encoder"])]
    notes = {"it holds no VAE": "vae" not in parts, f"{CLIP_SKIP} are left out": unused}
    return [*_notes(path, tensors, scheduler), *(note for note, holds in notes.items() if holds)]


def import_vae(path: Path, folder: Path) -> list[str]:
    """Writes the VAE in the file `path`, by itself or in a checkpoint, into `folder`/vae. Raises UserError."""
    tensors, metadata = _read(path)
    vae = _part(path, "vae", tensors)
    (folder / "vae").mkdir()
    _write_part(path, "vae", vae, _config(path, "vae", vae, _said(tensors, metadata)), folder)
    return []


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """read_tensors, less what stands before every name where a training saved its whole state."""
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise UserError(f"{path} holds no weights; copy or download it again")
    start = next((name[: name.index(PREFIXES["unet"])] for name in tensors if PREFIXES["unet"] in name), "")
    return {name.removeprefix(start): value for name, value in tensors.items()}, metadata


def _said(tensors: Collection[str], metadata: Mapping[str, str]) -> dict[str, dict]:
    """{part: what the file itself says of its configuration}, as export_single_file or others have written it."""
    try:
        found = json.loads(metadata.get(CONFIG_KEY) or "{}")
    except ValueError:
        found = {}
    found = found if isinstance(found, dict) else {}
    said = {part: dict(found[part]) for part in CONFIG_FILES if isinstance(found.get(part), dict)}
    size = re.fullmatch(r"(\d+)x\1", metadata.get("modelspec.resolution", ""))
    if size and not said:
        said["unet"] = dict(sample_size=int(size[1]) // PIXELS_PER_LATENT)
    scheduler = said.setdefault("scheduler", {})
    if not re.fullmatch(r"\w+Scheduler", str(scheduler.get("_class_name"))):
        scheduler.pop("_class_name", None)
    velocity = metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
    if PREDICTS_VELOCITY in tensors or velocity or metadata.get("ss_v_parameterization") == "True":
        scheduler["prediction_type"] = "v_prediction"
    if ZERO_TERMINAL_SNR in tensors or metadata.get("ss_zero_terminal_snr") == "True":
        if "_class_name" not in scheduler:  # only some of diffusers' schedulers know of it
            scheduler |= dict(_class_name="DDIMScheduler", timestep_spacing="trailing")
        scheduler["rescale_betas_zero_snr"] = True
    return said


def _whole(part: str, sizes: Mapping[str, Any], said: Mapping[str, dict]) -> dict[str, Any]:
    """A part's configuration: as the file says it, if it says all; else v1's, with what the tensors and it say."""
    own = dict(said.get(part, {}))
    is_whole = own.keys() >= {"_class_name", "_diffusers_version"} or "model_type" in own
    return own if is_whole else {**read_json(V1 / CONFIG_FILES[part]), **sizes, **own}


def _part(path: Path, part: str, tensors: Tensors) -> Tensors:
    """{original name without the part's prefix: tensor} of one part. Raises UserError if there is none."""
    prefix = PREFIXES[part]
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if part == "vae" and not found:  # a VAE by itself
        starts = ("encoder.", "decoder.", "quant_", "post_")
        found = {name: value for name, value in tensors.items() if name.startswith(starts)}
        if num_blocks := count(found, r"encoder\.down_blocks\.(\d+)\."):  # diffusers' names
            found = {single_file.original_vae_name(name, num_blocks): value for name, value in found.items()}
    if part == "text_encoder":
        kept = ((name, value) for name, value in found.items() if "position_ids" not in name)
        found = {single_file.original_text_name(name): value for name, value in kept}
    for name, value in found.items():
        if value.dtype not in DTYPES:
            raise UserError(f"{path}: {prefix}{name} is {value.dtype}; give a file in float16 or float32")
    return found


def _config(path: Path, part: str, tensors: Tensors, said: Mapping[str, dict]) -> dict[str, Any]:
    """A part's configuration: v1's, with the sizes of its tensors and what the file says. Raises UserError."""
    try:
        sizes = SIZES[part]({name: tuple(value.shape) for name, value in tensors.items()})
    except (KeyError, IndexError, ValueError) as error:
        name = f"{PREFIXES[part]}{first_line(error)}"
        raise UserError(f"{path} holds no whole {PARTS[part]} of Stable Diffusion v1: {name} is missing") from None
    config = _whole(part, sizes, said)
    check_config(path, part, config)
    return config


def _write_part(path: Path, part: str, tensors: Tensors, config: dict[str, Any], folder: Path) -> None:
    """Writes a part's configuration and its weights into `folder`, in the widest of their dtypes. Raises UserError."""
    write_json(folder / CONFIG_FILES[part], config)
    if part == "text_encoder":
        tensors = {name: value for name, value in tensors.items() if single_file.is_used_layer(name, config)}
    if part != "text_encoder":  # by diffusers, with that configuration
        cls = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
        dtype = functools.reduce(torch.promote_types, {value.dtype for value in tensors.values()})
        whole = {PREFIXES[part] + name: value for name, value in tensors.items()}
        options: dict = dict(config=str(folder), subfolder=part, torch_dtype=dtype, local_files_only=True)
        try:
            with quiet_libraries():
                model = cls.from_single_file(whole, **options)
            tensors = model.to("cpu").state_dict()  # fails if one has got no value
        except Exception as error:  # what does not fit fails in many ways, and every one is about the file
            missing = isinstance(error, NotImplementedError)
            reason = "some of its tensors are missing" if missing else first_line(error)
            raise UserError(f"{path} holds no whole {PARTS[part]} of Stable Diffusion v1 ({reason})") from None
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / part / f"{WEIGHT_STEMS[part]}.safetensors", {"format": "pt"})


def _notes(path: Path, tensors: Collection[str], scheduler: Mapping[str, Any]) -> list[str]:
    notes, used = [], (*PREFIXES.values(), PREDICTS_VELOCITY, ZERO_TERMINAL_SNR)
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        notes.append("it predicts velocity (v_prediction)")
    elif path.with_suffix(".yaml").exists():
        notes.append(f"{path.stem}.yaml beside it is not read: the model is taken to predict noise (epsilon)")
    if over := [name for name in tensors if not name.startswith(used)]:
        notes.append(f"{len(over)} tensors that a pipeline has no place for are left out, {over[0]} first")
    return notes


def _unet_sizes(shapes: Shapes) -> dict[str, Any]:
    steps_down = sorted(int(name.split(".")[1]) for name in shapes if name.endswith(".0.op.weight"))
    starts = [1, *(step + 1 for step in steps_down)]  # each block's first layer
    attention = [f"input_blocks.{start}.1.norm.weight" in shapes for start in starts]
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    return dict(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        block_out_channels=[shapes[f"input_blocks.{start}.0.out_layers.3.weight"][0] for start in starts],
        layers_per_block=steps_down[0] - 1,
        cross_attention_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
    )


def _vae_sizes(shapes: Shapes) -> dict[str, Any]:
    num_blocks = count(shapes, r"encoder\.down\.(\d+)\.")
    return dict(
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=[shapes[f"encoder.down.{block}.block.0.conv2.weight"][0] for block in range(num_blocks)],
        layers_per_block=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        down_block_types=["DownEncoderBlock2D"] * num_blocks,
        up_block_types=["UpDecoderBlock2D"] * num_blocks,
    )


def _text_encoder_sizes(shapes: Shapes) -> dict[str, Any]:
    vocab_size, width = shapes["text_model.embeddings.token_embedding.weight"]
    return dict(
        vocab_size=vocab_size,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
        num_hidden_layers=count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, width // CHANNELS_PER_HEAD),
    )


# Of a part's configuration what its tensors show, {original name: shape}. Raise KeyError or ValueError if they do not.
SIZES = {"unet": _unet_sizes, "vae": _vae_sizes, "text_encoder": _text_encoder_sizes}
