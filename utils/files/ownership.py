"""What this program wrote, where it may write, and which folders lie in one another."""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from utils import PROGRAM
from utils.errors import UserError
from utils.files.atomic import STAGING_PREFIX, is_same_place
from utils.files.json_files import read_json_or_none

RUN_FILE = "run.json"
LOCK_FILE = ".train_dreambooth.lock"
HOLDER_FILE = ".train_dreambooth.holder"  # which process has locked it
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
VALIDATION_FOLDER = "validation"
VALIDATION_PICTURES = "step-*.png"  # in it; anything else there is not ours
CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]{1,12})")
LOGS = (METRICS_FILE, VALIDATION_FILE, VALIDATION_FOLDER)  # what a run leaves of its way to the result
PREVIOUS_SUFFIX = ".previous"
PREVIOUS_NAMES = tuple(f"{name}{PREVIOUS_SUFFIX}" for name in (RUN_FILE, *LOGS))  # a finished run's, set aside
RUN_TYPES: dict[str, Any] = dict.fromkeys("arguments defaults used versions result base_model".split(), dict)
RUN_TYPES |= dict(determines=dict, photos=list, changes=list, strength=int | float, checkpoint_step=int)
CARD_NAMES = ("readme.md", "comparison.png")  # the model card and its picture, in small letters
RUN_NAMES = (RUN_FILE, *LOGS, *PREVIOUS_NAMES, *CARD_NAMES)
HALF_WRITTEN = (f"{STAGING_PREFIX}*", *(f".{name}.*part" for name in (HOLDER_FILE, *RUN_NAMES)))  # atomic.py's names
EXPORTED_FROM = "exported_from"  # in the run.json of a folder that was exported
EXPORT_METADATA = {"format": "pt", "written_by": PROGRAM}  # in the header of every single file that we write

# What systems, file managers and notebooks leave in a folder by themselves, in lower case.
LEFT_BY_SYSTEMS = (
    *(".ds_store", "._*", ".apdisk", ".fseventsd", ".localized", ".spotlight-v100"),  # macOS
    *(".temporaryitems", ".trashes", "icon\r"),
    *("desktop.ini", "ehthumbs.db", "thumbs.db", "thumbs.db:encryptable"),  # Windows
    *("$recycle.bin", "system volume information"),
    *(".directory", ".fuse_hidden*", ".nfs*", ".trash-*", "lost+found"),  # Linux
    *(".gitkeep", ".ipynb_checkpoints", ".stfolder", "@eadir"),  # git, Jupyter, Syncthing, Synology
)


def is_left_by_system(name: str) -> bool:
    """Whether nobody put a file or folder of that name there: it came by itself."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in LEFT_BY_SYSTEMS)


def is_half_written(name: str) -> bool:
    """Whether that is what a kill leaves of a file or folder that this program was writing."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in HALF_WRITTEN)


def kept_names(folder: Path) -> list[str]:
    """What somebody keeps in a folder: neither a lock, nor half written, nor left by systems."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    passing = (LOCK_FILE, HOLDER_FILE)
    return [name for name in names if not (name in passing or is_half_written(name) or is_left_by_system(name))]


def overlap(one: Path, other: Path) -> bool:
    """Whether two folders are one, or one holds the other, whatever the case of their names on this disk."""
    one, other = one.resolve(), other.resolve()
    pairs = [*((one, place) for place in (other, *other.parents)), *((other, place) for place in one.parents)]
    return any(is_same_place(*pair) for pair in pairs)


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that there is: where it would be made."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def check_writable(folder: Path, named: object) -> None:
    """Something can be written in `folder`, which may have to be made. Raises UserError about `named`."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise UserError(f"{named}: {existing} is a file, so no folder can be made in it")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{named}: nothing can be written in {existing}")


def run_of(folder: Path, name: str = RUN_FILE) -> dict:
    """A folder's run.json, less what is of another type than RUN_TYPES; empty without one, as beside a base."""
    found = read_json_or_none(folder / name) or {}
    run = {name: value for name, value in found.items() if isinstance(value, RUN_TYPES.get(name, object))}
    if "photos" in run:
        run["photos"] = [photo for photo in run["photos"] if isinstance(photo, dict)]
    return run


def result_of(folder: Path) -> dict:
    """run_of the result that is in an output folder, which a run that has not ended keeps until its own is there."""
    run = run_of(folder)
    if run.get("status") == "complete":
        return run
    return run_of(folder, PREVIOUS_NAMES[0]) or (run if (folder / "model_index.json").is_file() else {})


def prompts_of(run: Mapping[str, Any]) -> dict[str, int]:
    """{prompt: number of photos} by a run.json, in the photos' order."""
    said = run.get("arguments", {}).get("instance_prompt")
    prompts = [photo.get("prompt") or said for photo in run.get("photos", [])] or [said]
    return dict(Counter(prompt for prompt in prompts if isinstance(prompt, str) and prompt))


def is_own_output(folder: Path) -> bool:
    """Whether a run of this program made `folder`: its run.json says so."""
    return run_of(folder).get("program") == PROGRAM


def check_export_file(path: Path) -> None:
    """A file can be written to `path`: it ends in .safetensors, and an existing one is this program's. UserError."""
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path}: a single file is safetensors; give it a name like {path.stem}.safetensors")
    if os.path.lexists(path) and not _is_own_export(path):
        raise UserError(f"{path} exists and was not written by this program; give another name, or move it away")
    check_writable(path.parent, path)


def _is_own_export(path: Path) -> bool:
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("written_by") == PROGRAM
    except (OSError, SafetensorError):
        return False
