"""What a training's output is written as: a pipeline folder, one checkpoint file, or a LoRA; each at any strength."""

import os
from pathlib import Path

from utils.errors import UserError
from utils.files.atomic import replace_path
from utils.files.json_files import read_json_or_none, write_json
from utils.files.ownership import RUN_FILE, nearest_existing, overlap
from utils.files.safetensors_writer import SAVE_DTYPES, save_with_hash, write_safetensors
from utils.models.blending import blended_weights
from utils.models.folder import UNET_STEM, default_save_dtype, image_size, prediction_type, weight_files
from utils.models.lora import Lora, extract_lora, network_metadata
from utils.models.metadata import ARCHITECTURE, LORA_LAYOUT, file_metadata, run_of
from utils.models.saving import commit_pipeline

EXPORTED_FROM = "exported_from"  # in the run.json of a folder that was written by export_folder


def check_export_folder(target: Path, source: Path) -> None:
    """A pipeline folder can be written to `target`: it is new, empty, or was exported before. Raises UserError."""
    if overlap(target, source):
        raise UserError(f"{target} overlaps {source}: give the new pipeline a folder of its own")
    if os.path.lexists(target) and not target.is_dir():
        raise UserError(f"{target} is a file: name a new folder, or a file that ends in .safetensors")
    if target.is_dir() and any(target.iterdir()) and EXPORTED_FROM not in (read_json_or_none(target / RUN_FILE) or {}):
        raise UserError(f"{target} holds files that no export wrote: name an empty or a new folder")
    existing = nearest_existing(target)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{target}: nothing can be written in {existing}")


def export_folder(folder: Path, tuned: Path, base: Path, target: Path, strength: float, dtype: str | None) -> None:
    """Writes a pipeline folder: all of `folder`, with the UNet of `tuned` at `strength` of its way from `base`.

    Its run.json is the folder's, with where it came from, so that evaluate.py finds prompts and photos.

    Args:
        dtype: fp32 or fp16, of the UNet; None: as in `tuned`.
    """
    target.mkdir(parents=True, exist_ok=True)
    record = read_json_or_none(folder / RUN_FILE) or {}
    said = {EXPORTED_FROM: str(tuned), "strength": strength * record.get("strength", 1)}
    write_json(target / RUN_FILE, record | said)
    save_dtype = SAVE_DTYPES[dtype or default_save_dtype(weight_files(tuned, "unet"))]
    named = list(blended_weights(base, tuned, strength))
    commit_pipeline(
        target, folder, lambda unet: write_safetensors(unet / f"{UNET_STEM}.safetensors", named, save_dtype)
    )


def export_lora(
    folder: Path, tuned: Path, base: Path, path: Path, rank: int, strength: float, dtype: str | None
) -> Lora:
    """Writes the change from `base` to `tuned` as a LoRA to the file `path`; returns what is in it.

    Args:
        folder: the pipeline, whose run.json says what the file's header says of it.
        dtype: fp32 or fp16; None: fp16, as LoRA files usually are.
    """
    lora = extract_lora(base, tuned, rank, strength=strength, dtype=SAVE_DTYPES[dtype or "fp16"])
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = file_metadata(
        run_of(folder),
        title=path.stem,
        image_size=image_size(folder),
        prediction_type=prediction_type(folder),
        architecture=f"{ARCHITECTURE}/lora",
        implementation=LORA_LAYOUT,
    )
    metadata |= network_metadata(rank)
    replace_path(path, lambda part: save_with_hash(part, lora.state_dict, metadata))
    return lora
