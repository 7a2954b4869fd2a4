"""What some file systems cannot do (CIFS, exFAT, NTFS, FUSE, mounted buckets, overlays), done as well as they can.

A step that makes a result safer or tidier and that a file system refuses is a note, once a run; a disk that fails
(EIO) or is full is an error as ever.
"""

import contextlib
import errno
import os
import shutil
import sys
from pathlib import Path

# What a kernel or a FUSE program answers if it does not know a call, or not for this kind of file.
UNKNOWN = frozenset(
    (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY, errno.EPERM, errno.EACCES)
)
NO_SYNC = UNKNOWN | {errno.EBADF, errno.EISDIR, errno.EROFS}
NO_RENAME = UNKNOWN | {errno.EEXIST, errno.EXDEV}  # EXDEV: of a folder that an overlay has from a lower layer
_said: set[str] = set()


def note_once(place: Path, step: str, reason: OSError, consequence: str) -> None:
    """Says on stderr, once a run, which step the file system of `place` refuses and what follows from it."""
    if step not in _said:
        _said.add(step)
        line = f"note: the file system of {place} cannot {step} ({reason.strerror or reason}): {consequence}"
        with contextlib.suppress(OSError):  # the terminal has gone
            print(line, file=sys.stderr, flush=True)


def sync(path: Path) -> None:
    """Flushes a file, or a folder's own entries, to the disk; a note if the file system cannot."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        consequence = "a power cut within the next seconds could lose what was just written"
        note_once(path.parent, "sync folders" if is_folder else "sync files", error, consequence)


def set_mode(path: Path, mode: int) -> None:
    """The file's permissions; a note if the file system has none."""
    if path.stat().st_mode == mode:
        return
    try:
        path.chmod(mode)
    except OSError as error:
        note_once(path.parent, "set permissions", error, "they stay as they are")


def move(source: Path, target: Path) -> None:
    """Renames a file or a folder, over a file that is there; copies it if the file system cannot rename it so."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        consequence = "it is copied, and a kill just then could leave a part"
        note_once(target.parent, "rename", error, consequence)
        _move_by_copying(source, target)


def _move_by_copying(source: Path, target: Path) -> None:
    if source.is_dir():
        try:
            shutil.copytree(source, target, copy_function=shutil.copyfile)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        sync(target)
        shutil.rmtree(source)
        return
    target.unlink(missing_ok=True)
    try:
        os.rename(source, target)  # some only cannot rename over a file that is there
    except OSError:
        shutil.copyfile(source, target)
        sync(target)
        source.unlink()


def is_same_place(one: Path, other: Path) -> bool:
    """Whether two paths are one file or folder, also if the file system does not tell Cat from cat."""
    if one == other:
        return True
    try:
        return one.samefile(other) and one.stat().st_ino != 0
    except OSError:
        return False
