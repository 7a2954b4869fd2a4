"""One run at a time in an output folder: rank 0 locks a file in it, and the kernel unlocks it when the run ends."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

LOCK_FILE = ".train_dreambooth.lock"
SECONDS_FOR_A_DYING_RUN = 3.0  # a killed process lets go of its lock only when its memory has been freed
SECONDS_FOR_A_LOOK = 0.3  # another run may look at the lock just now


def check_not_in_use(output_dir: Path) -> None:
    """Raises UserError if another run is at work in `output_dir`; writes nothing. For rank 0."""
    path = output_dir / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _lock(descriptor, fcntl.LOCK_SH, path, SECONDS_FOR_A_DYING_RUN)
    except OSError:
        pass  # a file system without locks: hold_output says so
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def hold_output(output_dir: Path, is_main: bool) -> Iterator[None]:
    """A context in which no other run can enter `output_dir`, which is made if it is missing.

    Only the main rank locks: on the others nothing happens. Raises UserError if another run is in the folder. On a
    file system without locks a note says so.
    """
    if not is_main:
        yield
        return
    is_new = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK_FILE
    descriptor = _take(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if descriptor is not None and _is_at(path, descriptor):
                path.unlink()
            if is_new and not any(output_dir.iterdir()):
                output_dir.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _take(path: Path) -> int | None:
    """The descriptor that holds the lock; None if there are no locks."""
    try:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                _lock(descriptor, fcntl.LOCK_EX, path, SECONDS_FOR_A_LOOK)
            except BaseException:
                os.close(descriptor)
                raise
            if _is_at(path, descriptor):
                break
            os.close(descriptor)  # its last holder has removed it
    except OSError as error:
        reason = error.strerror or error
        print(f"note: {path} cannot be locked ({reason}): start no second run into this folder", file=sys.stderr)
        return None
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _lock(descriptor: int, kind: int, path: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise UserError(
                    f"--output_dir {path.parent} is in use by another run ({_holder(descriptor)}): wait for it, "
                    f"end it, or give this one a folder of its own"
                ) from None
            time.sleep(0.05)


def _holder(descriptor: int) -> str:
    try:
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "which has just started"
    except OSError:  # CIFS: who does not hold the lock cannot read the file either
        return "which does not say where it is"


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still lies at `path`."""
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
