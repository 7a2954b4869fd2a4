"""How wide what is printed may be: a terminal's width, or none in a log, which gets whole lines."""

import shutil
import sys
import textwrap

COLUMNS = 100  # at most: longer lines are hard to read


def columns() -> int | None:
    """Of stdout's terminal; None if it is none."""
    return min(COLUMNS, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def wrapped(line: str) -> str:
    """A paragraph in lines that fit; one that begins with a space is a command, which stays in one line."""
    width = columns()
    if width is None or line.startswith(" "):
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
