"""Which checkpoints there are in a folder, by their files alone."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from utils.pipeline import STAGING_PREFIX, UNET_STEM
from utils.preflight import PROGRAM

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


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where it is not one that this program committed."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        ours = state["program"] == PROGRAM and state["format"] == FORMAT
        return Checkpoint(path, int(state["step"]), state) if ours else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_checkpoints(output_dir: Path, run_id: str | None = None) -> list[Checkpoint]:
    """This program's checkpoints in a folder, oldest step first; of one run only where run_id is given."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = NAME.fullmatch(path.name)
        checkpoint = read_checkpoint(path) if match and path.is_dir() and not path.is_symlink() else None
        if checkpoint and checkpoint.step == int(match[1]) and run_id in (None, checkpoint.state.get("run_id")):
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def discard(path: Path) -> None:
    """Deletes one of our folders; hidden first, so that what a kill leaves is not taken for a whole one."""
    hidden = path.with_name(f"{STAGING_PREFIX}discarded-{path.name}-{os.getpid()}")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
