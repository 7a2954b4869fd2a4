"""Files and folders that are there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

LINK_ABOVE_BYTES = 1 << 20  # smaller files are copied: people edit configurations in place


def replace_path(path: Path, write: Callable[[Path], object], *, is_shared: bool = False) -> None:
    """`write(part)` writes a file beside `path`, which is then synced and renamed to it.

    So `path` is the old file or the whole new one, never a part of it; it has the permissions of any new file.

    Args:
        is_shared: other processes may write the same file at the same time. Each then has a `part` of its own; else
            what a killed process left is used again.
    """
    part = path.with_name(f".{path.name}.{f'{os.getpid()}.' if is_shared else ''}part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # a library may have made the file anew, for its owner alone
        _sync(part)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """As replace_path, with a `write` that takes an open file; several processes may do it at the same time."""

    def open_and_write(part: Path) -> None:
        with part.open("wb") as file:
            write(file)

    replace_path(path, open_and_write, is_shared=True)


def save_png(path: Path, image: "Image.Image", texts: dict[str, object]) -> None:
    """Writes a PNG whose text metadata holds `texts`, less those that are None."""
    from PIL.PngImagePlugin import PngInfo  # not at the top: --help and complaints need no pictures

    metadata = PngInfo()
    for name, value in texts.items():
        if value is not None:
            metadata.add_itxt(name, str(value))
    replace_file(path, lambda file: image.save(file, "PNG", pnginfo=metadata))


def sync_tree(folder: Path) -> None:
    """Flushes every file and directory below `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link to a large file if the file system allows it, else a copy; never a symbolic link."""
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
    """Flushes a directory's own entries to the disk: the renames in it."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
