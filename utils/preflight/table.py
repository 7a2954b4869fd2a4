"""What the checks find: the parts of a run, and the rows of one table with its verdict."""

import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from utils.concepts import Concept
    from utils.dataset import InstanceDataset
    from utils.models.folder import BaseModel
    from utils.run.plan import Plan
    from utils.run.resume import Sources

OK, NOTE, STOP = "ok", "note", "STOP"
Row = tuple[str, str, str]  # what was checked, what was found, and one of these


class Found:
    """The parts of a run that checks have found; `is_quick`: without what needs torch, whose import takes long."""

    base: "BaseModel"
    concepts: "list[Concept]"
    dataset: "InstanceDataset"
    plan: "Plan"
    sources: "Sources"

    def __init__(self, args: Namespace, is_quick: bool):
        self.args, self.is_quick = args, is_quick
        self.exit_codes: list[int] = []  # of a dry run's problems


# What it is about, the parts that it needs, and a function that adds what it finds to Found, and says it.
Check = tuple[str, str, Callable[[Found], Iterable[Row] | None]]


def rows_of(checks: Iterable[Check], found: Found) -> list[Row]:
    """The rows of all checks that have what they need; a failure is a row in a dry run, else it is raised."""
    rows: list[Row] = []
    for name, needs, check in checks:
        if not all(hasattr(found, part) for part in needs.split()):
            continue
        try:
            rows += check(found) or ()
        except UserError as error:
            if not found.args.dry_run:
                raise
            rows.append((name, str(error), STOP))
            found.exit_codes.append(error.exit_code)
    return rows


def as_lists(rows: list[Row]) -> dict[str, list[dict[str, str]]]:
    """What stops the run, and what is odd, for JSON."""
    lists = dict(problems=STOP, notes=NOTE)
    return {name: [dict(check=c, finding=f) for c, f, v in rows if v == verdict] for name, verdict in lists.items()}


def as_text(rows: list[Row], columns: int | None = None, *, in_full: bool = True) -> str:
    """The table, or before a run what is to be read of it, in `columns`; a name can do nothing to a terminal."""
    shown = [row for row in rows if in_full or row[-1] != OK]
    width = max((len(check) for check, *_ in shown), default=0)
    lines = ["preflight"] if in_full else []
    for check, finding, verdict in shown:
        finding = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in finding)
        start = f"{verdict:<4}  {check:<{width}}  "
        room = max(20, columns - len(start)) if columns else len(finding) + 1
        parts = textwrap.wrap(finding, room, break_on_hyphens=False) if len(finding) > room else [finding]
        lines += [start + parts[0], *(" " * len(start) + part for part in parts[1:])]
    notes = sum(verdict == NOTE for *_, verdict in rows)
    counted = f"{len(rows)} checks, {notes} note{'' if notes == 1 else 's'}"
    counted += "" if in_full else "; --dry_run lists them"
    problems = sum(verdict == STOP for *_, verdict in rows)
    verdict = f"NOT READY: {problems} to fix" if problems else "ready to train"
    return "\n".join([*lines, f"{verdict} ({counted})"])
