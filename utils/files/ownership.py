"""What this program wrote, and which folders lie in one another."""

import json
from pathlib import Path

from utils import PROGRAM

RUN_FILE = "run.json"


def overlap(one: Path, other: Path) -> bool:
    """Whether two folders are one, or one holds the other."""
    one, other = one.resolve(), other.resolve()
    return one == other or one in other.parents or other in one.parents


def is_own_output(folder: Path) -> bool:
    """Whether a run of this program made `folder`: its run.json says so."""
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("program") == PROGRAM
    except (OSError, ValueError, AttributeError):
        return False
