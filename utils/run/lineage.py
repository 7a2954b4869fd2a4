"""Which checkpoints there are in a folder, by their files alone, and from which a run goes on."""

import json
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

from utils import PROGRAM
from utils.errors import UserError, reason_of
from utils.files.atomic import STAGING_PREFIX
from utils.files.hashing import sha256_of_all
from utils.files.json_files import read_json
from utils.files.ownership import CHECKPOINT_NAME, RUN_FILE
from utils.models.folder import UNET_STEM
from utils.runtime import environment
from utils.values import as_path

STATE_FILE = "state.json"
TENSORS_FILE = "training_state.safetensors"
UNET_FILE = f"unet/{UNET_STEM}.safetensors"
FORMAT = 1
HASHES = "sha256"  # in state.json, of the files of tensors


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


def next_lineage(output_dir: Path, checkpoint: Checkpoint | None, *, is_changed: bool = False) -> Lineage:
    """The lineage of a run that resumes from a checkpoint, or starts anew.

    It is the checkpoint's own if nothing of that run is later than it and its inputs are the same; else the run
    branches off: what is later is left behind, and never taken for the new run's.
    """
    if checkpoint is None:
        return Lineage(uuid.uuid4().hex, [])
    lineage = lineage_of(checkpoint.state)
    if not is_changed and not left_behind(output_dir, checkpoint):
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
        checkpoint = read_checkpoint(path) if path.is_dir() and not path.is_symlink() else None
        if checkpoint and path.name == f"checkpoint-{checkpoint.step}" and (not lineage or lineage.holds(checkpoint)):
            found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, which are read for that; None if they are as they were written."""
    files = {checkpoint.path / name: name for name in (UNET_FILE, TENSORS_FILE)}
    try:
        digests, written = sha256_of_all(files), dict(checkpoint.state.get(HASHES, {}))
    except (OSError, TypeError, ValueError) as error:
        return f"{checkpoint.path}: {reason_of(error)}"
    changed = [file for file, name in files.items() if digests[file] != written.get(name)]
    return f"{changed[0]} is damaged: its SHA-256 is not that of what was written" if changed else None


def newest_whole(found: list[Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """The last of some checkpoints that is whole, and what is wrong with those after it."""
    damaged: list[str] = []
    for checkpoint in reversed(found):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged.append(reason)
    return None, damaged


def find_checkpoint(output_dir: Path, wanted: str | None, *, may_start_over: bool) -> Checkpoint | None:
    """The checkpoint to resume from: --resume_from_checkpoint's, or the latest if torchrun restarts the run.

    The latest is the newest that is whole; what is passed over is said. None: the run starts anew. Raises UserError if
    there is no such checkpoint, if it is damaged, and if a fresh start would leave an unfinished run's behind.
    """
    run = read_json(output_dir / RUN_FILE) if (output_dir / RUN_FILE).is_file() else {}
    own = list_checkpoints(output_dir, lineage_of(run)) if run.get("run_id") else []
    is_restarted = environment.is_restarted(run.get("launch"), may_start_over) and (
        environment.num_restarts() > 0 or run.get("status") != "complete"
    )
    if wanted == "latest" or (is_restarted and own):
        checkpoint = _latest(output_dir, own)
    elif wanted is not None:
        path = output_dir / wanted if CHECKPOINT_NAME.fullmatch(wanted) else as_path(wanted)
        checkpoint = read_checkpoint(path)
        if checkpoint is None:
            found = ", ".join(found.path.name for found in list_checkpoints(output_dir)) or "none"
            raise UserError(f"--resume_from_checkpoint {wanted}: {path} is no whole checkpoint; there are: {found}")
        if reason := damage(checkpoint):
            line = list_checkpoints(path.parent, lineage_of(checkpoint.state))
            whole, _ = newest_whole([each for each in line if each.path != path])
            raise UserError(f"{reason}; {f'{whole.path} is whole' if whole else 'there is no other of its run'}")
    else:
        checkpoint = None
        if own and run.get("status") != "complete" and not may_start_over:
            raise UserError(
                f"--output_dir {output_dir} holds an unfinished run with {own[-1].path.name}: resume it with "
                f"--resume_from_checkpoint latest, or start over with --overwrite_output_dir"
            )
    return checkpoint


def _latest(output_dir: Path, own: list[Checkpoint]) -> Checkpoint | None:
    """The newest of a run's own checkpoints that is whole; says which later ones are passed over. May be UserError."""
    checkpoint, damaged = newest_whole(own)
    if own and checkpoint is None:
        raise UserError(f"no checkpoint in {output_dir} is whole: {damaged[-1]}; name another --output_dir")
    last, known = checkpoint.step if checkpoint else -1, {each.path for each in own}
    numbered = ((path, CHECKPOINT_NAME.fullmatch(path.name)) for path in sorted(output_dir.glob("checkpoint-*")))
    foreign = [path for path, name in numbered if name and int(name[1]) > last and path not in known]
    for reason in [*damaged, *(f"{path} is no whole checkpoint of this run" for path in foreign)]:
        if environment.is_main():
            print(f"passed over: {reason}", flush=True)
    return checkpoint


def discard(path: Path) -> None:
    """Deletes one of our folders; hidden first, so that what a kill leaves is not taken for a whole one."""
    hidden = path.with_name(f"{STAGING_PREFIX}discarded-{path.name}-{os.getpid()}")
    try:
        os.rename(path, hidden)
    except OSError:  # a file system that cannot rename folders: without its state it is no checkpoint either
        (path / STATE_FILE).unlink(missing_ok=True)
        hidden = path
    shutil.rmtree(hidden, ignore_errors=True)
