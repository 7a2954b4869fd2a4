"""Which checkpoints there are in a folder, by their files alone."""

import json
import math
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

from utils import PROGRAM
from utils.models.saving import STAGING_PREFIX, UNET_STEM

STATE_FILE = "state.json"
TENSORS_FILE = "training_state.safetensors"
UNET_FILE = f"unet/{UNET_STEM}.safetensors"
FORMAT = 1
NAME = re.compile(r"checkpoint-([0-9]{1,12})")


class Checkpoint(NamedTuple):
    """A committed checkpoint folder and its state.json."""

    path: Path
    step: int
    state: dict

    @property
    def run_id(self) -> str:
        """Of the run that wrote it."""
        return str(self.state.get("run_id"))


class Line(NamedTuple):
    """A run and those that it branched off from, oldest first: [run id, the last step that is of this line] each."""

    run_id: str
    ancestors: list

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is of this line, and not of a run or a part of one that the line has left."""
        last_steps = dict(self.ancestors) | {self.run_id: math.inf}
        return checkpoint.step <= last_steps.get(checkpoint.run_id, -1)


def line_of(record: dict) -> Line:
    """The line that a run.json or a state.json is of."""
    run_id = str(record.get("run_id"))
    try:
        return Line(run_id, [[str(ancestor), int(step)] for ancestor, step in record.get("ancestors", [])])
    except (TypeError, ValueError):
        return Line(run_id, [])


def next_line(output_dir: Path, checkpoint: Checkpoint | None) -> Line:
    """The line of a run that goes on from a checkpoint, or starts anew.

    It is the checkpoint's own where nothing of that run is later than it; else the run branches off: what is later is
    left behind, and never taken for the new run's.
    """
    if checkpoint is None:
        return Line(uuid.uuid4().hex, [])
    line = line_of(checkpoint.state)
    if not left_behind(output_dir, checkpoint):
        return line
    return Line(uuid.uuid4().hex, [*line.ancestors, [line.run_id, checkpoint.step]])


def left_behind(output_dir: Path, checkpoint: Checkpoint) -> list[Checkpoint]:
    """Later checkpoints of the run that a checkpoint is of."""
    found = list_checkpoints(output_dir)
    return [other for other in found if other.step > checkpoint.step and other.run_id == checkpoint.run_id]


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where it is not one that this program committed."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        ours = state["program"] == PROGRAM and state["format"] == FORMAT
        return Checkpoint(path, int(state["step"]), state) if ours else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_checkpoints(output_dir: Path, line: Line | None = None) -> list[Checkpoint]:
    """This program's checkpoints in a folder, oldest step first; of one line only where it is given."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = NAME.fullmatch(path.name)
        checkpoint = read_checkpoint(path) if match and path.is_dir() and not path.is_symlink() else None
        if checkpoint and checkpoint.step == int(match[1]) and (line is None or line.holds(checkpoint)):
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def discard(path: Path) -> None:
    """Deletes one of our folders; hidden first, so that what a kill leaves is not taken for a whole one."""
    hidden = path.with_name(f"{STAGING_PREFIX}discarded-{path.name}-{os.getpid()}")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
