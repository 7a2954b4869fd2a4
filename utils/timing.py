"""Where the time before the first step goes."""

import time

_start = time.perf_counter()
marks: dict[str, float] = {}


def mark(name: str) -> None:
    """Notes that `name` is done, the first time it is; `marks` holds seconds since the program started."""
    marks.setdefault(name, round(time.perf_counter() - _start, 3))
