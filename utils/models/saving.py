"""The output: a complete pipeline directory, assembled in a hidden folder and moved into place when it is whole.

Weights are written one tensor at a time: no second copy of all of them is ever in memory.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from utils.errors import first_line
from utils.files.atomic import copy_into, move, staging_folder, sync, sync_tree
from utils.files.json_files import read_json, write_json
from utils.files.ownership import RUN_FILE
from utils.models.folder import CONFIG_FILES, FROZEN_PARTS, MODEL_INDEX, UNET_STEM, BaseModel

PIPELINE_CLASS = "StableDiffusionPipeline"  # whatever the base is drawn with: what is trained is text to image
SAVE_DTYPES = dict(fp32=torch.float32, fp16=torch.float16)  # --save_dtype
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16"}
PIECE = 1 << 24  # elements that leave a GPU at once


def assemble(staging: Path, base: BaseModel) -> None:
    """Puts everything of the base pipeline but the UNet's weights into the empty folder `staging`.

    The weights that are loaded get their plain names, so that every version of the libraries loads the result: the
    base may have them as fp16 variants only, or in shards with a stale index.
    """
    index = base.index | dict(_class_name=PIPELINE_CLASS)
    for part in FROZEN_PARTS:
        if not base.files(part) and part in index:
            index[part] = [None, None]
        copy_part(base, part, staging)
    copy_into(base.folder / "unet" / "config.json", staging / "unet" / "config.json")
    if read_json(base.folder / CONFIG_FILES["scheduler"]) != base.configs["scheduler"]:
        write_json(staging / CONFIG_FILES["scheduler"], base.configs["scheduler"])
    write_json(staging / MODEL_INDEX, index)


def copy_part(base: BaseModel, part: str, target: Path) -> None:
    """Copies all that is read of a part into `target`/part."""
    for name, source in base.files(part).items():
        copy_into(source, target / part / name)
    for name, content in (base.weights[part].index if part in base.weights else {}).items():
        write_json(target / part / name, content)


def save_unet(named: Iterable[tuple[str, torch.Tensor]], folder: Path, save_dtype: str, save_format: str) -> None:
    """Writes the UNet's weights from (name, float32 master) pairs, in `save_dtype`."""
    path, dtype = folder / f"{UNET_STEM}.{save_format}", SAVE_DTYPES[save_dtype]
    if save_format == "safetensors":
        write_safetensors(path, named, dtype)
        return
    contiguous = torch.contiguous_format
    copies = {name: value.to("cpu", dtype, copy=True, memory_format=contiguous) for name, value in named}
    try:
        torch.save(copies, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{path.name}: {first_line(error)}") from error


def commit_pipeline(
    output_dir: Path, base: BaseModel, write_unet: Callable[[Path], object], record: dict | None = None
) -> None:
    """Assembles the pipeline in a hidden folder inside output_dir, then moves its parts into place.

    `write_unet(folder)` writes the UNet's weights; `record`, if given, becomes run.json. model_index.json, without
    which nothing loads the folder, is taken away first and put back last: a half-moved pipeline is never taken for a
    whole one. If a move fails, those before it are undone, so that an earlier pipeline in output_dir is whole again.
    """
    with staging_folder(output_dir) as staging:
        (staging / "unet").mkdir()
        with ThreadPoolExecutor(1) as beside:
            assembled = beside.submit(assemble, staging, base)
            write_unet(staging / "unet")
        assembled.result()
        if record is not None:
            write_json(staging / RUN_FILE, record)
        sync_tree(staging)
        _swap(staging, output_dir)
        sync(output_dir)


def _swap(staging: Path, output_dir: Path) -> None:
    replaced = staging / "replaced"
    replaced.mkdir()
    parts = (*FROZEN_PARTS, "unet", *([RUN_FILE] if (staging / RUN_FILE).is_file() else []))
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


def write_safetensors(
    path: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, digest: Any = None
) -> None:
    """Writes (name, tensor) pairs as `dtype`, contiguous. A tensor leaves its device while the last one is written.

    Args:
        named: gone through twice, for the shapes and for the values: what is computed on the way need not be kept.
        digest: one of hashlib's, which is told all bytes of the file.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named:
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = dict(dtype=DTYPE_NAMES[dtype], shape=list(tensor.shape), data_offsets=[start, end])
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:

        def write(piece: Any) -> None:
            file.write(piece)
            if digest is not None:
                digest.update(piece)

        written = writer.submit(write, len(encoded).to_bytes(8, "little") + encoded)
        for values in _on_the_host(named, dtype):
            written.result()
            written = writer.submit(write, values.view(torch.uint8).numpy().data)
        written.result()


def _on_the_host(named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The tensors' values as `dtype`, flat, one after another; each stays valid until the one after the next.

    From a GPU they come in pieces through two pinned buffers: fresh memory costs more than the copy.
    """
    buffers: list[torch.Tensor] = []
    for _, tensor in named:
        values = tensor.detach().to(dtype, memory_format=torch.contiguous_format).contiguous().reshape(-1)
        if not values.is_cuda:
            yield values
            continue
        for piece in values.split(PIECE):
            if len(buffers) < 2:
                buffers.append(torch.empty(PIECE, dtype=dtype, pin_memory=True))
            buffers.reverse()
            yield buffers[0][: len(piece)].copy_(piece)
