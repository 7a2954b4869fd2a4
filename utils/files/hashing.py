"""SHA-256 of files, also of several at once and in the background."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

PIECE = 1 << 22  # bytes; other threads wait for the interpreter each time that one has been read


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(PIECE, path.stat().st_size or PIECE)))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


def in_background(function: Callable[..., object], *args: object) -> Future:
    """What `function(*args)` will return; its thread holds up neither the caller nor the end of the process."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="in the background", daemon=True).start()
    return future


def sha256_of_all(paths: Iterable[Path]) -> dict[Path, str]:
    """Hex digests of files, a few at once, and each once however many names it has."""
    inodes = {path: (path.stat().st_dev, path.stat().st_ino) for path in paths}
    distinct = {inode: path for path, inode in inodes.items()}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        digests = dict(zip(distinct, threads.map(sha256_of, distinct.values()), strict=True))
    return {path: digests[inode] for path, inode in inodes.items()}
