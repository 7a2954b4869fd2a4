"""What a training's output is written as: a pipeline folder, one checkpoint file, or a LoRA; each at any strength."""

import os
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files.atomic import replace_path
from utils.files.json_files import write_json
from utils.files.ownership import CHECKPOINT_NAME, RUN_FILE, check_writable, overlap, run_of
from utils.files.safetensors_writer import SAVE_DTYPES, save_with_hash, write_safetensors
from utils.models.blending import blended_weights
from utils.models.card import ARCHITECTURE, CHECKPOINT_STEP, STRENGTH, file_metadata, write_card
from utils.models.folder import UNET_STEM, BaseModel, find_weights, read_base
from utils.models.lora import LAYOUT, Lora, extract_lora, network_metadata
from utils.models.saving import commit_pipeline
from utils.models.single_file import export_single_file

EXPORTED_FROM = "exported_from"  # in the run.json of a folder that was written by export_folder


def check_export_folder(target: Path, source: Path) -> None:
    """A pipeline folder can be written to `target`: it is new, empty, or was exported before. Raises UserError."""
    if overlap(target, source):
        raise UserError(f"{target} overlaps {source}: give the new pipeline a folder of its own")
    if os.path.lexists(target) and not target.is_dir():
        raise UserError(f"{target} is a file: name a new folder, or a file that ends in .safetensors")
    if target.is_dir() and any(target.iterdir()) and EXPORTED_FROM not in run_of(target):
        raise UserError(f"{target} holds files that no export wrote: name an empty or a new folder")
    check_writable(target, target)


def exported_record(folder: Path, tuned: Path, strength: float) -> dict[str, Any]:
    """The run.json of `folder`, of the weights of `tuned`, a checkpoint of it or itself, at `strength`.

    What the run measured of its result is not said of other weights. Empty for a base.
    """
    record = run_of(folder)
    if not record or (tuned == folder and strength == 1):
        return record
    said, num_steps = {STRENGTH: strength * record.get(STRENGTH, 1)}, (record.get("result") or {}).get("num_steps")
    if tuned != folder and (found := CHECKPOINT_NAME.fullmatch(tuned.name)):
        num_steps = said[CHECKPOINT_STEP] = int(found[1])
    return record | said | dict(result=dict(num_steps=num_steps))


def export_folder(model: BaseModel, tuned: Path, base: Path, target: Path, strength: float, dtype: str | None) -> None:
    """Writes a pipeline folder: all of `model`, with the UNet of `tuned` at `strength` of its way from `base`.

    Its run.json is the model's, with where it came from, so that evaluate.py finds prompts and photos. An earlier
    export's card and picture, which tell of other weights, go.

    Args:
        dtype: fp32 or fp16, of the UNet; None: as in `tuned`.
    """
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / RUN_FILE, exported_record(model.folder, tuned, strength) | {EXPORTED_FROM: str(tuned)})
    save_dtype = SAVE_DTYPES[dtype or find_weights(tuned, "unet").save_dtype]
    named = list(blended_weights(base, tuned, strength))
    commit_pipeline(
        target, model, lambda unet: write_safetensors(unet / f"{UNET_STEM}.safetensors", named, save_dtype)
    )
    write_card(read_base(target))


def export_file(model: BaseModel, tuned: Path, base: Path, path: Path, strength: float, dtype: str | None) -> None:
    """As export_folder, as one file in the original layout; `dtype` fp32 or fp16, of all tensors."""
    run = None if tuned == model.folder and strength == 1 else exported_record(model.folder, tuned, strength)
    export_single_file(model, path, dtype, blended_weights(base, tuned, strength), run)


def export_lora(
    model: BaseModel,
    tuned: Path,
    base: Path,
    path: Path,
    rank: int,
    strength: float,
    dtype: str | None,
) -> Lora:
    """Writes the change from `base` to `tuned` as a LoRA to the file `path`; returns what is in it.

    Args:
        model: the pipeline, whose run.json says what the file's header says of it.
        dtype: fp32 or fp16; None: fp16, as LoRA files usually are.
    """
    lora = extract_lora(base, tuned, rank, strength=strength, dtype=SAVE_DTYPES[dtype or "fp16"])
    path.parent.mkdir(parents=True, exist_ok=True)
    run = exported_record(model.folder, tuned, strength)
    metadata = file_metadata(
        run,
        title=path.stem,
        image_size=model.image_size,
        prediction_type=model.prediction_type,
        architecture=f"{ARCHITECTURE}/lora",
        implementation=LAYOUT,
    )
    metadata |= network_metadata(run, path.stem, rank)
    replace_path(path, lambda part: save_with_hash(part, lora.state_dict, metadata))
    return lora
