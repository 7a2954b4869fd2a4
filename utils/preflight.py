"""What can be checked before a model is loaded: the base folder, the output folder, values that depend on both."""

import json
import os
import struct
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

MODEL_INDEX = "model_index.json"
RUN_FILE = "run.json"
PROGRAM = "train_dreambooth_colossalai"
PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SAFETENSORS_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "fp32", "F64": "fp32"}
PREDICTION_TYPES = ("epsilon", "v_prediction")
EXPORT_METADATA = {"format": "pt", "written_by": PROGRAM}  # in the header of every single file that we write
LFS_POINTER = b"version https://git-lfs"


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
    for part, expected in PART_CLASSES.items():
        _check_class(folder, index, part, expected)
    _check_tokenizer_and_scheduler(folder)
    unet, vae, text_encoder = (read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    _check_shapes(folder, unet, vae, text_encoder)
    for part in ("vae", "text_encoder"):
        weight_files(folder, part)
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


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises UserError naming the file where it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy or download the whole pipeline again") from None
    except (OSError, ValueError) as error:
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
    for path in found:
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


def has_only_fp16_variants(part_folder: Path) -> bool:
    """Whether every weight file of a part is an fp16 variant, as in diffusion_pytorch_model.fp16.safetensors."""
    names = [path.name for path in part_folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    return bool(names) and all(".fp16." in name for name in names)


def safetensors_dtype(path: Path) -> str | None:
    """The dtype of the first tensor, as the header names it ("F32", "F16", ...); None where there is no tensor.

    Raises UserError where the file is shorter or longer than its header says.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > num_bytes:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        if expected != num_bytes:
            raise ValueError(f"its header promises {expected} bytes, it has {num_bytes}")
        return tensors[0]["dtype"] if tensors else None
    except (ValueError, struct.error) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from None
    except (AttributeError, KeyError, IndexError, TypeError):
        raise UserError(f"{path} is not a safetensors file (its header lists no tensors); download it again") from None


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
    if output.is_dir() and any(output.iterdir()) and not is_own_output(output):
        raise UserError(
            f"--output_dir {output} holds files that this program did not write; name an empty or a new folder"
        )
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir {output}: {existing} is a file, so no folder can be made in it")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output}: no permission to write in {existing}")
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
