"""The process: its versions, where its time goes, how its programs are typed, what it prints, its progress bars."""

import contextlib
import gc
import io
import os
import platform
import select
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

PROJECT = Path(__file__).resolve().parents[2]
VERSIONED = ("torch", "colossalai", "diffusers", "transformers", "accelerate", "numpy", "Pillow", "safetensors")
COLUMNS = 100  # of what is printed, at most: longer lines are hard to read


def versions(names: tuple[str, ...] = VERSIONED) -> dict[str, str]:
    """Python's and the packages' versions; "missing" of one that is not installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _process_start() -> float:
    """When this process started; on Linux from the kernel, elsewhere when this module was imported."""
    now = time.perf_counter()
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # field 22, starttime
            return now - (float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return now


_started = _process_start()
marks: dict[str, float] = {}  # the run's: the seconds until each was done


def start_clock() -> None:
    """Begins a run: its marks count from the start of the process, or from now if an earlier run has made marks."""
    global _started, marks
    if marks:
        _started, marks = time.perf_counter(), {}


def mark(name: str) -> None:
    """Notes on the run's clock that `name` is done, the first time it is."""
    marks.setdefault(name, round(seconds_so_far(), 3))


def seconds_so_far() -> float:
    """By the run's clock."""
    return time.perf_counter() - _started


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """A context without garbage collection, a seventh of the imports' time; what is left is never looked at."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def typed(name: str) -> str:
    """`python` or `torchrun` as it has to be typed here: its name if that finds this environment's, else its path."""
    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not own.exists() or (found and Path(found).parent.resolve() == own.parent.resolve()):
        return name
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)


def typed_module(name: str) -> list[str]:
    """The words that run a module, `utils.export`: in another folder than the project's Python is told where it is."""
    command = [typed("python"), "-m", name]
    return command if Path.cwd().resolve() == PROJECT else ["env", f"PYTHONPATH={PROJECT}", *command]


def make_printable() -> None:
    """Whatever is printed from now on can be: what a terminal's encoding lacks is spelled out, as \\u732b; what cannot
    be written (the disk is full, a pipe's reader or the terminal has gone, there is no stdout) is dropped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a stream whose file was exchanged beneath it
                stream = _lasting(stream)
                stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream over a _LastingFile; itself if it is a stand-in (pytest's), of no file, or one of those."""
    if type(stream) is not io.TextIOWrapper or type(getattr(stream.buffer, "raw", stream.buffer)) is not io.FileIO:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    file = _LastingFile(stream)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # as Python does with -u
        encoding=stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _LastingFile(io.FileIO):
    """The file of an open stream. What cannot be written is dropped, each time anew: a full disk may get space."""

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.fileno(), "w", closefd=False)
        self.stream = stream  # it closes the file when nothing holds it any more

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        with contextlib.suppress(OSError):
            while rest:
                count = super().write(rest)
                if count is None:  # whoever shares the terminal set it not to wait
                    select.select([], [self], [])
                else:
                    rest = rest[count:]
        return len(data)


def columns() -> int | None:
    """Of stdout's terminal; None if it is none."""
    return min(COLUMNS, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def wrapped(line: str) -> str:
    """A paragraph in lines that fit; one that begins with a space is a command, which stays in one line."""
    width = columns()
    if width is None or line.startswith(" "):
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def progress_bar(description: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> "tqdm":
    """A bar on stderr with the time left, and its rate in units a second, however slow; `done` of `total` units were
    done before."""
    from tqdm import tqdm

    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file gets a line every ten seconds
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
        disable=not shown,
        file=sys.stderr,
    )
