"""What this program wrote, and which folders lie in one another."""

from pathlib import Path

from utils import PROGRAM
from utils.files.json_files import read_json_or_none

RUN_FILE = "run.json"


def overlap(one: Path, other: Path) -> bool:
    """Whether two folders are one, or one holds the other."""
    one, other = one.resolve(), other.resolve()
    return one == other or one in other.parents or other in one.parents


def is_own_output(folder: Path) -> bool:
    """Whether a run of this program made `folder`: its run.json says so."""
    return (read_json_or_none(folder / RUN_FILE) or {}).get("program") == PROGRAM
