"""Which checkpoints there are in a folder, by their files alone."""

import json
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

from utils import PROGRAM
from utils.files.atomic import STAGING_PREFIX
from utils.files.ownership import CHECKPOINT_NAME
from utils.models.folder import UNET_STEM

STATE_FILE = "state.json"
TENSORS_FILE = "training_state.safetensors"
UNET_FILE = f"unet/{UNET_STEM}.safetensors"
FORMAT = 1


class Checkpoint(NamedTuple):
    """A committed checkpoint folder and its state.json."""

    path: Path
    step: int
    state: dict

    @property
    def run_id(self) -> str:
        """Of the run that wrote it."""
        return str(self.state.get("run_id"))


class Lineage(NamedTuple):
    """A run and those that it branched off from, oldest first: [run id, the last step that is part of it] each."""

    run_id: str
    ancestors: list

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is of this lineage, and not of a run, or a part of one, that it has left."""
        last_steps = dict(self.ancestors) | {self.run_id: math.inf}
        return checkpoint.step <= last_steps.get(checkpoint.run_id, -1)


def lineage_of(record: dict) -> Lineage:
    """The lineage that a run.json or a state.json is of."""
    run_id = str(record.get("run_id"))
    try:
        return Lineage(run_id, [[str(ancestor), int(step)] for ancestor, step in record.get("ancestors", [])])
    except (TypeError, ValueError):
        return Lineage(run_id, [])


def next_lineage(output_dir: Path, checkpoint: Checkpoint | None) -> Lineage:
    """The lineage of a run that resumes from a checkpoint, or starts anew.

    It is the checkpoint's own if nothing of that run is later than it; else the run branches off: what is later is
    left behind, and never taken for the new run's.
    """
    if checkpoint is None:
        return Lineage(uuid.uuid4().hex, [])
    lineage = lineage_of(checkpoint.state)
    if not left_behind(output_dir, checkpoint):
        return lineage
    return Lineage(uuid.uuid4().hex, [*lineage.ancestors, [lineage.run_id, checkpoint.step]])


def left_behind(output_dir: Path, checkpoint: Checkpoint) -> list[Checkpoint]:
    """Later checkpoints of the run that a checkpoint is of."""
    found = list_checkpoints(output_dir)
    return [other for other in found if other.step > checkpoint.step and other.run_id == checkpoint.run_id]


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None if it is not one that this program committed."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        ours = state["program"] == PROGRAM and state["format"] == FORMAT
        return Checkpoint(path, int(state["step"]), state) if ours else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_checkpoints(output_dir: Path, lineage: Lineage | None = None) -> list[Checkpoint]:
    """This program's checkpoints in a folder, oldest step first; of one lineage only if it is given."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if not match or not path.is_dir() or path.is_symlink():
            continue
        checkpoint = read_checkpoint(path)
        if checkpoint and checkpoint.step == int(match[1]) and (lineage is None or lineage.holds(checkpoint)):
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def discard(path: Path) -> None:
    """Deletes one of our folders; hidden first, so that what a kill leaves is not taken for a whole one."""
    hidden = path.with_name(f"{STAGING_PREFIX}discarded-{path.name}-{os.getpid()}")
    try:
        os.rename(path, hidden)
    except OSError:  # a file system that cannot rename folders: without its state it is no checkpoint either
        (path / STATE_FILE).unlink(missing_ok=True)
        hidden = path
    shutil.rmtree(hidden, ignore_errors=True)
