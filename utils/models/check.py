"""What can be checked before a model is loaded: the base folder, the output folder, values that depend on both."""

import json
import os
import struct
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files.lock import LOCK_FILE, check_not_in_use
from utils.models.folder import (
    default_save_dtype,
    has_only_fp16_variants,
    read_json,
    safetensors_dtype,
    safetensors_header,
    weight_files,
)

__all__ = ["default_save_dtype", "has_only_fp16_variants", "safetensors_dtype"]  # from model_files, for others

MODEL_INDEX = "model_index.json"
RUN_FILE = "run.json"
PROGRAM = "train_dreambooth_colossalai"
PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
LIBRARIES = (
    "diffusers",
    "transformers",
    "stable_diffusion",
    None,
)  # stable_diffusion: old names of the safety checker
PREDICTION_TYPES = ("epsilon", "v_prediction")
EXPORT_METADATA = {"format": "pt", "written_by": PROGRAM}  # in the header of every single file that we write


class BaseModel(NamedTuple):
    """What the base folder's configuration files say."""

    folder: Path
    vae_scale_factor: int
    unet_weights: list[Path]


def check_base_model(folder: Path) -> BaseModel:
    """The base pipeline folder is complete and of Stable Diffusion v1's architecture; reads configuration files only.

    Raises UserError naming the missing or unfit file.
    """
    _check_folder(folder)
    index = read_json(folder / MODEL_INDEX)
    for part, entry in index.items():
        if isinstance(entry, list) and (len(entry) != 2 or entry[0] not in LIBRARIES):
            raise UserError(
                f"{folder / MODEL_INDEX}: {part} is {entry!r}, which is not a class of diffusers or transformers; "
                f"nothing is ever imported from a model's folder"
            )
    for part, expected in PART_CLASSES.items():
        _check_class(folder, index, part, expected)
    _check_tokenizer_and_scheduler(folder)
    unet, vae, text_encoder = (read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    check_configs(folder, unet, vae, text_encoder)
    _check_shapes(folder, unet, vae, text_encoder)
    for part in ("vae", "text_encoder"):
        weight_files(folder, part)
    check_weight_shapes(folder, unet, vae, text_encoder)
    return BaseModel(folder, 2 ** (len(vae.get("block_out_channels", [64])) - 1), weight_files(folder, "unet"))


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        name = str(folder)
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.parent.is_dir():
            raise UserError(
                f"--pretrained_model_name_or_path: there is no folder {name}, and nothing is downloaded at run time; "
                f"if you mean the model of that name on the Hugging Face Hub, fetch it first, for example with "
                f"'git lfs install && git clone https://huggingface.co/{name} model/{name.split('/')[1]}'"
            )
        raise UserError(f"--pretrained_model_name_or_path: there is no folder {folder}")
    if not folder.is_dir():
        raise UserError(f"--pretrained_model_name_or_path: {folder} is a file; name the pipeline's folder")
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(
            f"{folder} has no {MODEL_INDEX}, so it is not a complete diffusers pipeline; download it again"
        )


def _check_class(folder: Path, index: dict, part: str, expected: str) -> None:
    entry = index.get(part)
    found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    if found != expected:
        raise UserError(
            f"{folder / MODEL_INDEX}: {part} is {found!r}, but this program trains Stable Diffusion v1 pipelines, "
            f"whose {part} is {expected}"
        )
    if not (folder / part / "config.json").is_file():
        raise UserError(f"{folder} lacks {part}/config.json; copy or download the whole pipeline again")


def _check_tokenizer_and_scheduler(folder: Path) -> None:
    if not any((folder / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise UserError(f"{folder} lacks tokenizer/vocab.json; copy or download the whole pipeline again")
    config = folder / "scheduler" / "scheduler_config.json"
    prediction_type = read_json(config).get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"{config}: prediction_type is {prediction_type!r}; this program trains {' and '.join(PREDICTION_TYPES)}"
        )


def check_configs(folder: Path, unet: dict, vae: dict, text_encoder: dict) -> None:
    """Raises UserError where a number in a config.json is none, or far from any Stable Diffusion v1's."""
    wanted = [("unet", unet, "in_channels"), ("unet", unet, "out_channels"), ("unet", unet, "cross_attention_dim")]
    wanted += [("vae", vae, "latent_channels"), ("text_encoder", text_encoder, "hidden_size")]
    wanted += [("unet", unet, "layers_per_block"), ("text_encoder", text_encoder, "vocab_size")]
    values = [(part, key, config[key]) for part, config, key in wanted if key in config]
    for part, config in (("unet", unet), ("vae", vae)):
        channels = config.get("block_out_channels", [])
        values += [
            (part, "block_out_channels", value) for value in (channels if isinstance(channels, list) else [None])
        ]
    for part, key, value in values:
        if type(value) is not int or not 0 < value <= 1_000_000:
            raise UserError(
                f"{folder / part / 'config.json'}: {key} is {value!r}, not a sensible number; "
                f"copy or download the file again"
            )
    if len(vae.get("block_out_channels", [0])) not in range(1, 9):
        raise UserError(f"{folder / 'vae' / 'config.json'}: block_out_channels has no or too many numbers")


def check_weight_shapes(folder: Path, unet: dict, vae: dict, text_encoder: dict) -> None:
    """The first tensors in the safetensors headers have the shapes that the configurations ask for."""
    first = {part: (config.get("block_out_channels") or [None])[0] for part, config in (("unet", unet), ("vae", vae))}
    hidden, vocab = text_encoder.get("hidden_size"), text_encoder.get("vocab_size")
    expected = [
        ("unet", "conv_in.weight", [first["unet"], unet.get("in_channels", 4), 3, 3]),
        ("unet", "conv_out.weight", [unet.get("out_channels", 4), first["unet"], 3, 3]),
        ("vae", "encoder.conv_in.weight", [first["vae"], vae.get("in_channels", 3), 3, 3]),
        ("text_encoder", "text_model.embeddings.token_embedding.weight", [vocab, hidden]),
    ]
    headers = {part: _headers(folder, part) for part in PART_CLASSES}
    for part, name, shape in expected:
        for path, header in headers[part]:
            if name in header and None not in shape and header[name]["shape"] != shape:
                raise UserError(
                    f"{path}: {name} has shape {header[name]['shape']}, but {part}/config.json asks for {shape}; "
                    f"the two are not of one model"
                )


def _headers(folder: Path, part: str) -> list[tuple[Path, dict]]:
    paths = [path for path in weight_files(folder, part) if path.suffix == ".safetensors"]
    return [(path, safetensors_header(path)) for path in paths]


def _check_shapes(folder: Path, unet: dict, vae: dict, text_encoder: dict) -> None:
    latent_channels, in_channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if in_channels != latent_channels:
        raise UserError(
            f"{folder / 'unet' / 'config.json'}: in_channels is {in_channels}, but the VAE's latents have "
            f"{latent_channels}; inpainting and depth models cannot be trained by this program"
        )
    width, wanted = text_encoder.get("hidden_size"), unet.get("cross_attention_dim")
    if width != wanted:
        raise UserError(
            f"{folder}: the text encoder's hidden_size is {width}, but the UNet's cross_attention_dim is {wanted}; "
            f"the two are not of one model"
        )


def check_resolution(args: Namespace, base: BaseModel) -> None:
    """Raises UserError where the VAE cannot encode crops of --resolution."""
    factor = base.vae_scale_factor
    if args.resolution % factor:
        lower = args.resolution // factor * factor
        near = f"{lower} or {lower + factor}" if lower else str(factor)
        raise UserError(f"--resolution {args.resolution} is not divisible by the VAE's factor {factor}; use {near}")


def check_output_dir(args: Namespace) -> None:
    """--output_dir can be written and holds nothing that is not this program's; writes nothing itself.

    Raises UserError otherwise, also where it overlaps the base model's or the photos' folder.
    """
    output = args.output_dir
    for flag in ("pretrained_model_name_or_path", "instance_data_dir", "tokenizer_name"):
        other = getattr(args, flag)
        if other and overlap(output, other):
            raise UserError(f"--output_dir {output} overlaps --{flag} {other}; give the output a folder of its own")
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f"--output_dir {output} is not a folder; name a new or an empty one")
    if output.is_dir() and {path.name for path in output.iterdir()} - {LOCK_FILE} and not is_own_output(output):
        raise UserError(
            f"--output_dir {output} holds files that this program did not write; name an empty or a new folder"
        )
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir {output}: {existing} is a file, so no folder can be made in it")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output}: no permission to write in {existing}")
    if os.environ.get("RANK", "0") == "0":
        check_not_in_use(output)
    if args.export_single_file:
        check_export_file(args.export_single_file)


def check_export_file(path: Path) -> None:
    """A single file can be written to `path`: it ends in .safetensors, and an existing one is this program's.

    Raises UserError otherwise.
    """
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: a single file is written as safetensors; give it a name like {path.stem}.safetensors"
        )
    if os.path.lexists(path) and not _is_own_export(path):
        raise UserError(f"{path} exists and was not written by this program; give another name, or move it away")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{path}: nothing can be written in {existing}")


def _is_own_export(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
        return header["__metadata__"]["written_by"] == PROGRAM
    except (OSError, ValueError, struct.error, KeyError, TypeError, MemoryError, OverflowError):
        return False


def overlap(one: Path, other: Path) -> bool:
    """Whether two folders are one, or one holds the other."""
    one, other = one.resolve(), other.resolve()
    return one == other or one in other.parents or other in one.parents


def is_own_output(folder: Path) -> bool:
    """Whether a run of this program made `folder`: its run.json says so."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("program") == PROGRAM
    except (OSError, ValueError, AttributeError):
        return False
