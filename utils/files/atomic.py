"""Files and folders that are there whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from utils.files.filesystems import move, set_mode, sync

STAGING_PREFIX = ".assembling-"


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
        set_mode(part, mode)  # a library may have made the file anew, for its owner alone
        sync(part)
        move(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """As replace_path, with a `write` that takes an open file; several processes may do it at the same time."""

    def open_and_write(part: Path) -> None:
        with part.open("wb") as file:
            write(file)

    replace_path(path, open_and_write, is_shared=True)


def sync_tree(folder: Path) -> None:
    """Flushes every file and directory below `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def copy_into(source: Path, target: Path) -> None:
    """A copy of a file, or of what a symbolic link leads to, in a folder that is made if it is missing.

    Never a hard link: who edits the copy in place, or copies another file over it, must not change the source.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.resolve(), target)


@contextlib.contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent` to assemble something in and to move it from; what is left there is removed."""
    folder = parent / f"{STAGING_PREFIX}{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
