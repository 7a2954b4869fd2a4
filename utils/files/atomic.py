"""Files and folders that are there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def save_png(path: Path, image: Image.Image, texts: Mapping[str, object] = MappingProxyType({})) -> None:
    """Writes a PNG whose text metadata holds `texts`, less those that are None."""
    metadata = PngInfo()
    for name, value in texts.items():
        if value is not None:
            metadata.add_itxt(name, str(value))
    replace_file(path, lambda file: image.save(file, "PNG", pnginfo=metadata))


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside `path`, syncs and renames it: `path` is the old file or the whole new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


LINK_ABOVE_BYTES = 1 << 20  # smaller files are copied: people edit configurations in place


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


def sync_directory(folder: Path) -> None:
    """Flushes a directory's own entries: the renames in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


STAGING_PREFIX = ".assembling-"
