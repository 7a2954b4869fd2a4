"""The table of what is checked before a model is loaded: rows, and one verdict."""

import textwrap
from collections.abc import Callable
from typing import TypeVar

from utils.errors import UserError
from utils.runtime import terminal

OK, NOTE, STOP = "ok", "note", "STOP"
T = TypeVar("T")


class PreflightTable:
    """Rows of (check, finding, verdict). Without `collects`, the first problem is raised instead.

    `is_quick`: what needs torch, whose import takes longer than all the rest, is left out.
    """

    def __init__(self, collects: bool, is_quick: bool = False):
        self.collects, self.is_quick = collects, is_quick
        self.rows: list[tuple[str, str, str]] = []

    def add(self, check: str, finding: str, verdict: str = OK) -> None:
        """One row; what a file's name might do to a terminal is made visible."""
        plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in finding)
        self.rows.append((check, plain, verdict))

    def run(self, check: str, function: Callable[..., T], *args: object, **options: object) -> T | None:
        """What `function` returns; None if it raised a UserError, which is then a row."""
        try:
            return function(*args, **options)
        except UserError as error:
            if not self.collects:
                raise
            self.add(check, str(error), STOP)
            return None

    def add_run(self, check: str, function: Callable[..., tuple[str, str]], *args: object, **options: object) -> None:
        """A row with what `function` returns: a finding and a verdict."""
        row = self.run(check, function, *args, **options)
        if row is not None:
            self.add(check, *row)

    @property
    def num_problems(self) -> int:
        """Rows that stop the run."""
        return sum(verdict == STOP for *_, verdict in self.rows)

    def text(self, columns: int | None = None) -> str:
        """The table; findings that are too long for `columns` go on below themselves."""
        width = max(len(check) for check, *_ in self.rows)
        lines = ["preflight"]
        for check, finding, verdict in self.rows:
            start = f"{verdict:<4}  {check:<{width}}  "
            room = max(20, columns - len(start)) if columns else len(finding) + 1
            parts = textwrap.wrap(finding, room, break_on_hyphens=False) if len(finding) > room else [finding]
            lines += [start + parts[0], *(" " * len(start) + part for part in parts[1:])]
        notes = sum(verdict == NOTE for *_, verdict in self.rows)
        counted = f"{len(self.rows)} checks, {notes} note{'' if notes == 1 else 's'}"
        verdict = f"NOT READY: {self.num_problems} to fix" if self.num_problems else "ready to train"
        return "\n".join([*lines, f"{verdict} ({counted})"])

    def show(self) -> None:
        """Prints the table, on a terminal in as many columns as it has; a log gets whole lines."""
        print(self.text(terminal.columns()), flush=True)
