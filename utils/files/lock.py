"""One run at a time in an output folder: rank 0 locks a file in it, and the kernel unlocks it when the run ends."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import TryAgain
from utils.files.atomic import replace_path
from utils.files.ownership import HOLDER_FILE, LOCK_FILE

SECONDS_FOR_A_DYING_RUN = 3.0  # a killed process lets go of its lock only when its memory has been freed
SECONDS_FOR_A_LOOK = 0.3  # another run may look at the lock just now


@contextlib.contextmanager
def locked(path: Path, seconds: float = -1) -> Iterator[OSError | None]:
    """A context in which no other process can lock `path`, which is made if it is missing.

    Yields None, or why there is no lock: some file systems have none. Raises filelock.Timeout if it is not free within
    `seconds`; by default it is waited for.
    """
    lock, problem = FileLock(path, timeout=seconds, fallback_to_soft=False), None
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        problem = error
    try:
        yield problem
    finally:
        lock.release()


def check_not_in_use(output_dir: Path) -> None:
    """Raises UserError if another run is at work in `output_dir`; writes nothing. For rank 0."""
    if (output_dir / LOCK_FILE).exists():
        with _alone_in(output_dir, SECONDS_FOR_A_DYING_RUN):
            pass


@contextlib.contextmanager
def hold_output(output_dir: Path, is_main: bool) -> Iterator[None]:
    """A context in which no other run enters `output_dir`, made if missing; TryAgain if one is there. For rank 0."""
    if not is_main:
        yield
        return
    is_new = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    path, holder = output_dir / LOCK_FILE, output_dir / HOLDER_FILE
    with _alone_in(output_dir, SECONDS_FOR_A_LOOK) as problem:
        if problem is not None:
            reason = problem.strerror or problem
            print(f"note: {path} cannot be locked ({reason}): start no second run into this folder", file=sys.stderr)
        else:
            with contextlib.suppress(OSError):  # a full disk
                said = f"process {os.getpid()} on {socket.gethostname()}\n"
                replace_path(holder, lambda part: part.write_text(said), is_shared=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                for left in (holder, path) if problem is None else ():
                    left.unlink(missing_ok=True)  # who waits for the lock sees that, and makes it anew
                if is_new and not any(output_dir.iterdir()):
                    output_dir.rmdir()


@contextlib.contextmanager
def _alone_in(output_dir: Path, seconds: float) -> Iterator[OSError | None]:
    with contextlib.ExitStack() as held:
        try:
            problem = held.enter_context(locked(output_dir / LOCK_FILE, seconds))
        except Timeout:
            holder = ""
            with contextlib.suppress(OSError):
                holder = (output_dir / HOLDER_FILE).read_text(errors="replace").strip()
            raise TryAgain(
                f"--output_dir {output_dir} is in use by another run ({holder or 'which has just started'}): wait for "
                f"it, end it, or give this one a folder of its own"
            ) from None
        yield problem
