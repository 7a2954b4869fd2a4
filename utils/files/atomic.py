"""Files and folders that are there whole or not at all, also on file systems that cannot do all that this takes.

CIFS, exFAT, NTFS, FUSE, mounted buckets and overlays refuse some of the steps that make a result safer or tidier: that
is a note, once a run. A disk that fails (EIO) or is full is an error as ever.
"""

import contextlib
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

STAGING_PREFIX = ".assembling-"
# What a kernel or a FUSE program answers if it does not know a call, or not for this kind of file.
UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY, errno.EPERM, errno.EACCES}
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


def replace_path(path: Path, write: Callable[[Path], object], *, is_shared: bool = False) -> None:
    """`write(part)` writes a file beside `path`, which is then synced and renamed to it.

    So `path` is the old file or the whole new one, never a part of it; it has the permissions of any new file. What a
    killed process left of `part` goes, as does a link that somebody put there: it is never followed. If the file
    `is_shared`, other processes may write it at the same time, each with a `part` of its own.
    """
    part = path.with_name(f".{path.name}.{f'{os.getpid()}.' if is_shared else ''}part")
    try:
        part.unlink(missing_ok=True)
        part.touch(exist_ok=False)
        mode = part.stat().st_mode
        write(part)
        if part.stat().st_mode != mode:  # a library may have made the file anew, for its owner alone
            try:
                part.chmod(mode)
            except OSError as error:
                note_once(path.parent, "set permissions", error, "they stay as they are")
        sync(part)
        move(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


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
