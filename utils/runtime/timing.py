"""Where the time before the first step, and after the last one, goes."""

import contextlib
import gc
import os
import time
from collections.abc import Iterator


class Clock:
    """The seconds from `started`, a time of time.perf_counter(), to each mark."""

    def __init__(self, started: float):
        self.started = started
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Notes that `name` is done, the first time it is."""
        self.marks.setdefault(name, round(time.perf_counter() - self.started, 3))


def _process_start() -> float:
    """When this process started; on Linux from the kernel, elsewhere when this module was imported."""
    now = time.perf_counter()
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # field 22, starttime
            return now - (float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return now


clock = Clock(_process_start())


def start() -> None:
    """Begins a run: its marks count from the start of the process, or from now if an earlier run has made marks."""
    global clock
    if clock.marks:
        clock = Clock(time.perf_counter())


def mark(name: str) -> None:
    """Notes on the run's clock that `name` is done, the first time it is."""
    clock.mark(name)


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Imports make a million objects and hardly any garbage: looking for it takes a seventh of their time.

    What is there at the end is not looked at again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
