"""What can be checked before a model is loaded: the base folder, the output folder, values that depend on both."""

import json
import os
import re
from pathlib import Path

from utils.errors import UserError
from utils.files.json_files import read_json
from utils.files.ownership import RUN_FILE
from utils.files.safetensors_files import safetensors_dtype, safetensors_header
from utils.models.folder import (
    LFS_POINTER,
    MODEL_INDEX,
    WEIGHT_STEMS,
    BaseModel,
    default_save_dtype,
    has_only_fp16_variants,
    weight_files,
)

__all__ = ["default_save_dtype", "has_only_fp16_variants", "safetensors_dtype"]  # from model_files, for others
PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
LIBRARIES = (
    "diffusers",
    "transformers",
    "stable_diffusion",
    None,
)  # stable_diffusion: old names of the safety checker
PREDICTION_TYPES = ("epsilon", "v_prediction")


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


def check_pipeline_folder(folder: Path, flag: str, safety_checker: bool = False) -> None:
    """Checks that `folder` holds every file of a Stable Diffusion v1 pipeline, whole. Raises UserError."""
    check_is_folder(folder, flag, "name a pipeline folder")
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(f"{flag} {folder} has no model_index.json: {_what_it_looks_like(folder)}")
    model_index = read_json(folder / MODEL_INDEX)
    class_name = model_index.get("_class_name", "StableDiffusionPipeline")
    if class_name != "StableDiffusionPipeline":
        raise UserError(
            f"{flag} {folder} is a {class_name}: only StableDiffusionPipeline (Stable Diffusion v1) is sampled"
        )
    weight_stems = dict(WEIGHT_STEMS)
    if safety_checker:
        for name in ("safety_checker", "feature_extractor"):
            if not (folder / name).is_dir() or not (model_index.get(name) or [None])[0]:
                raise UserError(
                    f"--safety_checker: {folder} has no {name}: leave the flag out, or use a folder with one"
                )
        weight_stems["safety_checker"] = "model"
        check_json(folder / "feature_extractor" / "preprocessor_config.json", flag)
    for name, stem in weight_stems.items():
        check_json(folder / name / "config.json", flag)
        check_weights(folder / name, stem, flag)
    check_json(folder / "scheduler" / "scheduler_config.json", flag)
    tokenizer = folder / "tokenizer"
    vocabulary = ["tokenizer.json"] if (tokenizer / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    for name in vocabulary:
        _check_file(tokenizer / name, flag)


def check_is_folder(folder: Path, flag: str, mend: str) -> None:
    """Raises UserError where `folder` is not a folder."""
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{flag} {folder} is a file, not a folder: {mend}")
    if flag != "--instance_data_dir" and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(folder)):
        raise UserError(
            f"{flag} {folder} is not a folder here. If it is a name on the Hugging Face hub, nothing is downloaded: "
            f"'git lfs install && git clone https://huggingface.co/{folder} model/{folder.name}', "
            f"then {flag} model/{folder.name}"
        )
    raise UserError(f"{flag} {folder} does not exist: {mend}")


def _what_it_looks_like(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if not names:
        return "it is empty: let training finish, or name another folder"
    if {RUN_FILE, "metrics.jsonl"} & names or any(name.startswith((".assembling-", "checkpoint-")) for name in names):
        return "it looks like an unfinished training output: let train_dreambooth_colossalai.py finish first"
    if "config.json" in names:
        return "it looks like one model (a UNet, say), not a pipeline: name the folder above it"
    if "unet" in names:
        return "it looks like a pipeline copied in part: copy model_index.json and the rest too"
    return "it is no pipeline folder: name one that holds model_index.json, unet/, vae/, text_encoder/ and so on"


def check_json(path: Path, flag: str) -> None:
    """Raises UserError where a JSON file is missing, empty, not readable or damaged."""
    _check_file(path, flag)
    read_json(path)


def _check_file(path: Path, flag: str) -> None:
    if not path.is_file():
        raise UserError(f"{flag} is incomplete: {path} is missing: copy the folder again")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag}: no permission to read {path}: change its mode")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} is incomplete: {path} is empty: copy the folder again")
    if _is_lfs_pointer(path):
        raise UserError(_lfs_message(path))


def check_weights(folder: Path, stem: str, flag: str) -> None:
    """Checks the weights that will be loaded: one .safetensors, its shards, one .bin, or the fp16 variant of these."""
    bin_stem = "pytorch_model" if stem == "model" else stem
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    others = [folder / name for name in (f"{bin_stem}.bin", f"{stem}.fp16.safetensors", f"{bin_stem}.fp16.bin")]
    if index.is_file() and not single.is_file():
        _check_file(index, flag)
        weights = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        weights = [path for path in (single, *others) if path.is_file()][:1]
    if not weights:
        raise UserError(f"{flag} is incomplete: {folder} holds no {single.name} (or .bin): copy the folder again")
    for path in weights:
        _check_file(path, flag)
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            raise UserError(f"{path} is cut off or damaged: copy or download it again")


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if not 2 <= header_size <= size - 8:
            return False
        try:
            header = json.loads(file.read(header_size))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return size == 8 + header_size + max(ends, default=0)


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _lfs_message(path: Path) -> str:
    return f"{path} is a git-lfs pointer, not the file: run 'git lfs install && git lfs pull' in that repository"
