"""From which checkpoint a run goes on, and whether it would still be the same run."""

import importlib
import shlex
import shutil
import sys
from argparse import Namespace
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from utils.arguments import training_parser
from utils.data.concepts import Concept
from utils.errors import UserError
from utils.files.hashing import in_background
from utils.files.json_files import read_json
from utils.files.ownership import RUN_FILE
from utils.files.safetensors_files import safetensors_dtype
from utils.models.folder import BaseModel
from utils.run.fingerprint import base_files, determinants, hash_files
from utils.run.lineage import (
    NAME,
    TENSORS_FILE,
    UNET_FILE,
    Checkpoint,
    left_behind,
    line_of,
    list_checkpoints,
    read_checkpoint,
)
from utils.run.plan import fill_in_defaults
from utils.runtime import environment
from utils.runtime.gpu import gpu_is_usable

FLAGS_OF_ONE_START = ("--resume_from_checkpoint", "--overwrite_output_dir", "--allow_changes", "--dry_run")


class Start(NamedTuple):
    """From where a run starts: a checkpoint or None, and the base's files as they were, {path: (size, mtime)}.

    `base_hashes` will be what hash_files returns; None on other ranks, and in a dry run that needs none.
    """

    checkpoint: Checkpoint | None
    base_files: dict[Path, tuple[int, int]]
    base_hashes: Future | None


def prepare_start(args: Namespace, base: BaseModel, concepts: list[Concept], dataset) -> Start:
    """Finds the checkpoint to go on from and, on rank 0, compares the run it is of with this one.

    Fills in args.mixed_precision and args.max_train_steps. Raises UserError where the run cannot go on.
    """
    num_ranks = environment.num_ranks()
    fill_in_defaults(args, num_photos=len(dataset), num_ranks=num_ranks, on_gpu=gpu_is_usable())
    checkpoint, files = find_checkpoint(args), base_files(base)
    check_steps(args, checkpoint)
    if not environment.is_main():
        return Start(checkpoint, files, None)
    hashes = None if args.dry_run and checkpoint is None else in_background(hash_files, base)
    if checkpoint is not None:
        _compare(args, checkpoint, num_ranks, concepts, dataset, hashes)
    elif args.resume_from_checkpoint:
        print(f"no checkpoint in {args.output_dir} yet: starting anew", flush=True)
    return Start(checkpoint, files, hashes)


def _compare(args: Namespace, checkpoint: Checkpoint, num_ranks: int, concepts, dataset, base_hashes: Future) -> None:
    if not args.dry_run:
        importlib.import_module(
            "utils.runtime.colossal"
        )  # training needs it: it takes seconds, as the hashing does meanwhile
    found = determinants(args, num_ranks, concepts, dataset, base_hashes.result())
    for change in check_same_run(args, checkpoint, found):
        print(f"changed since the checkpoint: {change}", flush=True)
    _say_what_is_left(args.output_dir, checkpoint)


def _say_what_is_left(output_dir: Path, checkpoint: Checkpoint) -> None:
    names = ", ".join(later.path.name for later in left_behind(output_dir, checkpoint))
    if names:
        print(
            f"the run branches off at step {checkpoint.step}: {names} are not its own, so 'latest' passes over them; "
            f"they are kept until a checkpoint of that name, or the result, takes their place",
            flush=True,
        )


def find_checkpoint(args: Namespace) -> Checkpoint | None:
    """The checkpoint to go on from: --resume_from_checkpoint's, or the latest where torchrun restarts the run.

    None: the run starts anew. Raises UserError where there is no such checkpoint, where it is damaged, and where a
    fresh start would leave an unfinished run's checkpoints behind.
    """
    run = _run_of(args.output_dir)
    own = list_checkpoints(args.output_dir, line_of(run)) if run.get("run_id") else []
    wanted = args.resume_from_checkpoint
    if wanted == "latest" or (environment.restarted() and own):
        checkpoint = own[-1] if own else None
    elif wanted is not None:
        checkpoint = _named(args.output_dir, wanted)
    else:
        checkpoint = None
        if own and run.get("status") != "complete" and not args.overwrite_output_dir:
            raise UserError(
                f"--output_dir {args.output_dir} holds an unfinished run with {own[-1].path.name}: go on from it with "
                f"--resume_from_checkpoint latest, or start over with --overwrite_output_dir"
            )
    if checkpoint is not None:
        safetensors_dtype(checkpoint.path / UNET_FILE)
        safetensors_dtype(checkpoint.path / TENSORS_FILE)
    return checkpoint


def _run_of(output_dir: Path) -> dict:
    return read_json(output_dir / RUN_FILE) if (output_dir / RUN_FILE).is_file() else {}


def _named(output_dir: Path, wanted: str) -> Checkpoint:
    path = output_dir / wanted if NAME.fullmatch(wanted) else Path(wanted)
    checkpoint = read_checkpoint(path)
    if checkpoint is None:
        found = ", ".join(found.path.name for found in list_checkpoints(output_dir)) or "none"
        raise UserError(
            f"--resume_from_checkpoint {wanted}: {path} is not a whole checkpoint of this program; "
            f"in {output_dir} there are: {found}"
        )
    return checkpoint


def differences(old: dict, new: dict) -> list[str]:
    """What differs between two results of what_determines, a phrase each: "--seed: 0 -> 1"."""
    found = []
    for group in sorted(old.keys() | new.keys()):
        before, after = old.get(group), new.get(group)
        if not (isinstance(before, dict) and isinstance(after, dict)):
            found += [f"{group}: {before!r} -> {after!r}"] if before != after else []
        elif group == "arguments":
            names = sorted(before.keys() | after.keys())
            pairs = [(name, before.get(name), after.get(name)) for name in names]
            found += [f"--{name}: {one!r} -> {other!r}" for name, one, other in pairs if one != other]
        else:
            found += [f"{group}: {change}" for change in _file_changes(before, after)]
    return found


def _file_changes(before: dict, after: dict) -> list[str]:
    changes = [f"{name!r} has gone" for name in before if name not in after]
    changes += [f"{name!r} is new" for name in after if name not in before]
    return changes + [f"{name!r} has changed" for name in before if name in after and before[name] != after[name]]


def check_same_run(args: Namespace, checkpoint: Checkpoint, determines: dict) -> list[str]:
    """Differences from the run that the checkpoint is of; UserError where there are some and no --allow_changes.

    A flag that is newer than the checkpoint counts as left out then: its default is what was done before it. A flag
    that has gone since is not compared.
    """
    kept = dict(checkpoint.state.get("determines", {}))
    parser = training_parser()
    defaults = {flag: parser.get_default(flag) for flag in determines["arguments"]}
    kept["arguments"] = defaults | {k: v for k, v in kept.get("arguments", {}).items() if k in vars(args)}
    found = differences(kept, determines)
    if found and not args.allow_changes:
        raise UserError(
            f"{checkpoint.path} is of a run with other inputs: {'; '.join(found)}. Give it the same inputs, or "
            f"--allow_changes to go on with the new ones"
        )
    return found


def check_steps(args: Namespace, checkpoint: Checkpoint | None) -> None:
    """Raises UserError where the checkpoint is beyond --max_train_steps, which must have been filled in."""
    if checkpoint is not None and checkpoint.step > args.max_train_steps:
        raise UserError(
            f"{checkpoint.path} is beyond --max_train_steps {args.max_train_steps}; give more steps or resume from "
            f"an earlier checkpoint"
        )


def resume_command(argv: list[str], num_ranks: int) -> str:
    """The command line that goes on from the latest checkpoint."""
    kept, skip = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        if flag in FLAGS_OF_ONE_START:
            skip = flag == FLAGS_OF_ONE_START[0] and not equals
        elif skip:
            skip = False
        else:
            kept.append(word)
    script = sys.argv[0] if Path(sys.argv[0]).name == "train_dreambooth_colossalai.py" else None
    torchrun = Path(sys.executable).with_name("torchrun")
    launcher = "torchrun" if shutil.which("torchrun") == str(torchrun) or not torchrun.exists() else str(torchrun)
    ranks_here = str(environment.local_world_size() or num_ranks)
    command = [launcher, "--nproc_per_node", ranks_here, script or "train_dreambooth_colossalai.py", *kept]
    return shlex.join([*command, "--resume_from_checkpoint", "latest"])
