"""The output: a complete pipeline directory, assembled in a hidden folder and moved into place when it is whole."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from utils.errors import first_line
from utils.files.atomic import copy_into, move, staging_folder, sync, sync_tree
from utils.files.json_files import write_json
from utils.files.safetensors_writer import SAVE_DTYPES, write_safetensors
from utils.models.folder import FROZEN_PARTS, MODEL_INDEX, UNET_STEM, BaseModel, part_files

PIPELINE_CLASS = "StableDiffusionPipeline"  # whatever the base is drawn with: what is trained is text to image


def assemble(staging: Path, base: BaseModel) -> None:
    """Puts everything of the base pipeline but the UNet's weights into the empty folder `staging`.

    The weights that are loaded get their plain names, so that every version of the libraries loads the result: the
    base may have them as fp16 variants only, or in shards with a stale index.
    """
    index = base.index | dict(_class_name=PIPELINE_CLASS)
    for part in FROZEN_PARTS:
        if not (base.folder / part).is_dir() and part in index:
            index[part] = [None, None]
        for name, source in part_files(base, part).items():
            copy_into(source, staging / part / name)
        weights = base.weights.get(part)
        if weights is not None and weights.index is not None:
            write_json(staging / part / weights.index_name, weights.index)
    copy_into(base.folder / "unet" / "config.json", staging / "unet" / "config.json")
    write_json(staging / MODEL_INDEX, index)


def save_unet(named: Iterable[tuple[str, torch.Tensor]], folder: Path, save_dtype: str, save_format: str) -> Path:
    """Writes the UNet's weights from (name, float32 master) pairs, in `save_dtype`. Returns the file."""
    path, dtype = folder / f"{UNET_STEM}.{save_format}", SAVE_DTYPES[save_dtype]
    if save_format == "safetensors":
        write_safetensors(path, named, dtype)
        return path
    contiguous = torch.contiguous_format
    copies = {name: value.to("cpu", dtype, copy=True, memory_format=contiguous) for name, value in named}
    try:
        torch.save(copies, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{path.name}: {first_line(error)}") from error
    return path


def commit_pipeline(output_dir: Path, base: BaseModel, write_unet: Callable[[Path], object]) -> None:
    """Assembles the pipeline in a hidden folder inside output_dir, then moves its parts into place.

    `write_unet(folder)` writes the UNet's weights. model_index.json, without which nothing loads the folder, is taken
    away first and put back last: a half-moved pipeline is never taken for a whole one. Where a move fails, those
    before it are undone, so that an earlier pipeline in output_dir is whole again.
    """
    with staging_folder(output_dir) as staging:
        (staging / "unet").mkdir()
        with ThreadPoolExecutor(1) as beside:
            assembled = beside.submit(assemble, staging, base)
            write_unet(staging / "unet")
        assembled.result()
        sync_tree(staging)
        _swap(staging, output_dir)
        sync(output_dir)


def _swap(staging: Path, output_dir: Path) -> None:
    replaced = staging / "replaced"
    replaced.mkdir()
    parts = (*FROZEN_PARTS, "unet")
    moves = [(output_dir / name, replaced / name) for name in (MODEL_INDEX, *parts)]
    moves += [(staging / name, output_dir / name) for name in (*parts, MODEL_INDEX)]
    done = []
    try:
        for source, target in moves:
            if os.path.lexists(source):
                move(source, target)
                done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            move(target, source)
        raise
