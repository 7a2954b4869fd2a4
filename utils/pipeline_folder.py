"""Whether a folder is a whole Stable Diffusion v1 pipeline, found out without loading a model."""

import json
import os
import re
from pathlib import Path

from utils.errors import UserError
from utils.models.check import MODEL_INDEX, RUN_FILE
from utils.models.folder import LFS_POINTER, WEIGHT_STEMS, read_json


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
