"""Where the time before the first step, and after the last one, goes."""

import os
import time

marks: dict[str, float] = {}


def _seconds_since_process_start() -> float:
    """Of this process; on Linux from the kernel, elsewhere from this module's import."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # field 22, starttime
            return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


_start = time.perf_counter() - _seconds_since_process_start()


def mark(name: str) -> None:
    """Notes that `name` is done, the first time it is; `marks` holds seconds since the process started."""
    marks.setdefault(name, round(time.perf_counter() - _start, 3))
