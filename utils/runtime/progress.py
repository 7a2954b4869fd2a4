"""The one way in which work that takes long is shown: how far it is, how fast it goes, and how long it will take."""

import sys

from tqdm import tqdm


def progress_bar(description: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> tqdm:
    """A bar on stderr with its rate and the time left; `done` of `total` units were done before."""
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file gets a line every ten seconds
        dynamic_ncols=True,
        disable=not shown,
        file=sys.stderr,
    )
