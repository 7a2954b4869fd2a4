"""SHA-256 of files, each read once a process where it has not changed since."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

SETTLED_NS = 2_000_000_000  # a file changed less than this ago may change again without a new time of change
_known: dict[tuple, Future] = {}
_lock = threading.Lock()


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces; who asks for one that another thread is reading waits for that."""
    found = os.stat(path)
    key = (os.path.abspath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    with _lock:
        is_new = key not in _known
        digest = _known.setdefault(key, Future())
    if is_new:
        try:
            digest.set_result(_read(path))
        except BaseException as error:
            digest.set_exception(error)
        if digest.exception() or time.time_ns() - found.st_mtime_ns < SETTLED_NS:
            with _lock:
                del _known[key]
    return digest.result()


def _read(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def in_background(function: Callable, *args) -> Future:
    """What `function(*args)` will return; its thread holds up neither the caller nor the end of the process."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="hashing", daemon=True).start()
    return future


def sha256_of_all(paths: Iterable[Path]) -> dict[Path, str]:
    """Hex digests of files, a few at once, and each once however many names it has; remembers none."""
    inodes = {path: (path.stat().st_dev, path.stat().st_ino) for path in paths}
    distinct = {inode: path for path, inode in inodes.items()}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        digests = dict(zip(distinct, threads.map(_read, distinct.values()), strict=True))
    return {path: digests[inode] for path, inode in inodes.items()}
