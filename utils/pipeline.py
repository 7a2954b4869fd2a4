"""The output: a complete pipeline directory, assembled in a hidden folder and moved into place when it is whole."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from utils.preflight import MODEL_INDEX, PROGRAM, RUN_FILE, has_only_fp16_variants

FROZEN_PARTS = ("feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "vae")
METRICS_FILE = "metrics.jsonl"
PREVIOUS_SUFFIX = ".previous"
PREVIOUS_NAMES = (f"{RUN_FILE}{PREVIOUS_SUFFIX}", f"{METRICS_FILE}{PREVIOUS_SUFFIX}")
STAGING_PREFIX = ".assembling-"
LINK_ABOVE_BYTES = 1 << 20  # smaller files are copied: people edit configurations in place
UNET_STEM = "diffusion_pytorch_model"


def write_json(path: Path, value: dict) -> None:
    """Writes beside, syncs and renames: a reader sees the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.partial")
    # backslashreplace: file names that are not UTF-8 hold lone surrogates, and \udcXX is how JSON writes those.
    with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def sync_tree(folder: Path) -> None:
    """Flushes every file and directory below `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link to a large file where the file system allows it, else a copy; never a symbolic link."""
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LINK_ABOVE_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def assemble(staging: Path, base: Path) -> None:
    """Puts everything of the base pipeline but the UNet's weights into the empty folder `staging`.

    Weights that the base has as fp16 variants only get plain names: the UNet's file beside them has one, and
    from_pretrained takes one kind or the other.
    """
    index = json.loads((base / MODEL_INDEX).read_text(encoding="utf-8"))
    for part in FROZEN_PARTS:
        if (base / part).is_dir():
            only_variants = has_only_fp16_variants(base / part)
            for source in sorted(path for path in (base / part).rglob("*") if path.is_file()):
                if not source.name.startswith("."):
                    target = staging / source.relative_to(base)
                    name = target.name.replace(".fp16.", ".") if only_variants else target.name
                    link_or_copy(source, target.with_name(name))
        elif part in index:
            index[part] = [None, None]
    link_or_copy(base / "unet" / "config.json", staging / "unet" / "config.json")
    write_json(staging / MODEL_INDEX, index)


def save_unet(flat, folder: Path, save_dtype: str, save_format: str) -> Path:
    """Writes the UNet's weights, always from the fp32 masters of its FlatParameters. Returns the file."""
    import torch

    from utils.safetensors_writer import SAVE_DTYPES, write_safetensors

    path, dtype = folder / f"{UNET_STEM}.{save_format}", SAVE_DTYPES[save_dtype]
    flat.settle()
    named = flat.named(flat.master)
    if save_format == "safetensors":
        write_safetensors(path, named, dtype)
    else:
        own = dict(copy=True, memory_format=torch.contiguous_format)
        torch.save({name: value.to("cpu", dtype, **own) for name, value in named}, path)
    return path


def start_output(output_dir: Path, run: dict, continues: bool = False) -> None:
    """Claims the output folder: makes it where needed and writes run.json. An earlier result in it stays loadable.

    `continues` says that the folder's metrics.jsonl, up to the step from which the run goes on, is the run's own.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for leftover in output_dir.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not continues:
        _set_aside(output_dir, run.get("run_id"))
    write_json(output_dir / RUN_FILE, {"program": PROGRAM, "status": "running", **run})


def read_record(output_dir: Path) -> dict:
    """The run.json of an output folder; empty where there is none that can be read."""
    try:
        record = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _set_aside(output_dir: Path, run_id: str | None) -> None:
    """Keeps a finished run's run.json and metrics.jsonl under other names until its result is replaced."""
    record = read_record(output_dir)
    if not record or record.get("run_id") == run_id:
        return
    if record.get("status") == "complete":
        shutil.copyfile(output_dir / RUN_FILE, output_dir / f"{RUN_FILE}{PREVIOUS_SUFFIX}")
        if (output_dir / METRICS_FILE).exists():
            os.replace(output_dir / METRICS_FILE, output_dir / f"{METRICS_FILE}{PREVIOUS_SUFFIX}")
    else:
        (output_dir / METRICS_FILE).unlink(missing_ok=True)


def commit_pipeline(output_dir: Path, base: Path, write_unet) -> None:
    """Assembles the pipeline in a hidden folder inside output_dir, then moves its parts into place.

    `write_unet(folder)` writes the UNet's weights. model_index.json, without which nothing loads the folder, is taken
    away first and put back last: a half-moved pipeline is never taken for a whole one. Where a move fails, those
    before it are undone, so that an earlier pipeline in output_dir is whole again.
    """
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=output_dir))
    try:
        assemble(staging, base)
        write_unet(staging / "unet")
        sync_tree(staging)
        _swap(staging, output_dir)
        sync_directory(output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
                os.replace(source, target)
                done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def sync_directory(folder: Path) -> None:
    """Flushes a directory's own entries: the renames in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
