"""Checkpoints: a whole training state beside the UNet that diffusers loads, written while training continues.

checkpoint-N/unet/                        config.json, diffusion_pytorch_model.safetensors in --save_dtype
checkpoint-N/training_state.safetensors   exp_avg.*, exp_avg_sq.* and, unless unet/ holds them in float32, master.*
checkpoint-N/state.json                   the step, loss scale, counters, and hashes of files and inputs

Tensors are stored by parameter name, contiguous: a checkpoint of one memory layout or device resumes on another.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from utils import PROGRAM
from utils.errors import RunFailed, UserError
from utils.files.atomic import move, staging_folder, sync, sync_tree
from utils.files.json_files import write_json
from utils.models.folder import find_weights
from utils.models.saving import SAVE_DTYPES, write_safetensors
from utils.run import lineage
from utils.run.lineage import Checkpoint, Lineage
from utils.training import snapshot
from utils.training.optimizer import MasterWeightsOptimizer
from utils.training.snapshot import COUNTERS, COUNTERS_OF_UPDATES, Named, Snapshot


class Checkpointer:
    """Writes checkpoints of an optimizer's state: a snapshot is taken at once, a thread brings it to the disk.

    Args:
        unet_config: the bytes of the UNet's config.json.
        describe: what state.json says besides step and counters; called in the thread.
        save_dtype: "fp32" or "fp16", of the UNet's file.
        lineage: whose older checkpoints may be removed.
        total_limit: how many of them are kept; None: all.
        say: told one line about each checkpoint, in the thread that trains.
    """

    def __init__(
        self,
        output_dir: Path,
        optimizer: MasterWeightsOptimizer,
        *,
        unet_config: bytes,
        describe: Callable[[], dict],
        save_dtype: str,
        lineage: Lineage,
        total_limit: int | None,
        say: Callable[[str], None],
    ):
        self.output_dir, self.snapshot = output_dir, Snapshot(optimizer)
        self.unet_config, self.describe, self.save_dtype = unet_config, describe, save_dtype
        self.lineage, self.total_limit, self.say = lineage, total_limit, say
        self.seconds = 0.0  # that the last write took
        self._written: Future[str] | None = None

    def save(self, step: int) -> None:
        """Starts to write the state after `step` steps; waits for the write before, or where memory has no room."""
        self.wait()
        arrived = self.snapshot.take()
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"checkpoint-{step}")
        self._written = thread.submit(self._write, step, arrived)
        thread.shutdown(wait=self.snapshot.is_shared)

    def report(self) -> None:
        """Says how the last write went, if it is over."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self, *, may_fail: bool = True) -> None:
        """Waits for the write under way and says how it went; RunFailed if it failed and may not."""
        written, self._written = self._written, None
        try:
            if written is not None:
                self.say(written.result())
        except RunFailed as error:
            if not may_fail:
                raise
            self.say(str(error))

    def save_and_wait(self, step: int) -> None:
        """Writes the state after `step` steps before it returns; RunFailed if that cannot be done."""
        self.save(step)
        self.wait(may_fail=False)

    def _write(self, step: int, arrived: Callable[[], None]) -> str:
        """The line to say of a checkpoint, once it is there. RunFailed if it cannot be written."""
        started = time.perf_counter()
        try:
            arrived()
            num_bytes = self._commit(step)
        except (OSError, UserError) as error:
            why = getattr(error, "strerror", None) or error
            raise RunFailed(f"checkpoint-{step} could not be written to {self.output_dir}: {why}") from error
        self.seconds = time.perf_counter() - started
        return f"checkpoint-{step}: {num_bytes / 1e9:.3g} GB written in {self.seconds:.1f} s"

    def _commit(self, step: int) -> int:
        """Assembles the checkpoint in a hidden folder, moves it into place, then removes those beyond the limit."""
        target = self.output_dir / f"checkpoint-{step}"
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with staging_folder(self.output_dir) as staging:
            (staging / "unet").mkdir()
            self._fill(staging, step)
            sync_tree(staging)
            if os.path.lexists(target):
                if target.is_symlink() or lineage.read_checkpoint(target) is None:
                    raise UserError(f"{target} exists and is not this program's; move it away")
                lineage.discard(target)
            move(staging, target)
            sync(self.output_dir)
        if self.total_limit is not None:
            others = [found for found in lineage.list_checkpoints(self.output_dir, self.lineage) if found.step != step]
            for checkpoint in others[: max(0, len(others) + 1 - self.total_limit)]:
                lineage.discard(checkpoint.path)
        return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())

    def _fill(self, folder: Path, step: int) -> None:
        (folder / "unet" / "config.json").write_bytes(self.unet_config)
        state = self.snapshot.training_state(with_masters=self.save_dtype != "fp32")
        tensors = {lineage.UNET_FILE: (self.snapshot.masters(), SAVE_DTYPES[self.save_dtype])}
        tensors[lineage.TENSORS_FILE] = (state, torch.float32)
        digests = {name: hashlib.sha256() for name in tensors}
        for name, (named, dtype) in tensors.items():
            write_safetensors(folder / name, named, dtype, digests[name])
        written = dict(program=PROGRAM, format=lineage.FORMAT, step=step, **self.lineage._asdict())
        written[lineage.HASHES] = {name: digest.hexdigest() for name, digest in digests.items()}
        written["optimizer"] = self.snapshot.counters()
        write_json(folder / lineage.STATE_FILE, written | self.describe())


def restore(checkpoint: Checkpoint, optimizer: MasterWeightsOptimizer) -> None:
    """Puts a checkpoint's state into the optimizer. Raises UserError if its files are damaged or of another model."""
    path = checkpoint.path
    masters_are_in_unet = find_weights(path, "unet").save_dtype == "fp32"
    had_scale = checkpoint.state.get("determines", {}).get("arguments", {}).get("mixed_precision") == "fp16"
    names = COUNTERS if had_scale and optimizer.scales_loss else COUNTERS_OF_UPDATES
    counters = {name: checkpoint.state.get("optimizer", {}).get(name) for name in names}
    for name, value in counters.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{path / lineage.STATE_FILE}: {name} is {value!r}; resume from another checkpoint")

    def read(part: str, named: Named) -> None:
        if part == "master" and masters_are_in_unet:
            _read_tensors(path / lineage.UNET_FILE, "", named)
        else:
            _read_tensors(path / lineage.TENSORS_FILE, f"{part}.", named)

    snapshot.restore(optimizer, read, counters)


def _read_tensors(file: Path, prefix: str, named: Named) -> None:
    """Fills the (name, tensor) pairs with what the file holds under prefix + name."""
    try:
        with safe_open(file, framework="pt") as stored:
            for name, tensor in named:
                value = stored.get_tensor(prefix + name)
                if value.shape != tensor.shape or value.dtype != torch.float32:
                    raise UserError(f"{file}: {prefix + name} is not of this model; resume from another checkpoint")
                if not value.isfinite().all():
                    raise UserError(f"{file}: {prefix + name} is not finite; resume from an earlier checkpoint")
                tensor.copy_(value)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); resume from another checkpoint") from error
