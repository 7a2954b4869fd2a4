"""Checkpoints: a whole training state beside the UNet that diffusers loads, written while training goes on.

checkpoint-N/unet/                        config.json, diffusion_pytorch_model.safetensors in --save_dtype
checkpoint-N/training_state.safetensors   exp_avg.*, exp_avg_sq.* and, unless unet/ holds them in float32, master.*
checkpoint-N/state.json                   the step, the loss scale and its counters, what the run was made from

Tensors are stored by parameter name, contiguous: a checkpoint of one memory layout or device resumes on another.
"""

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from utils import PROGRAM
from utils.errors import RunFailed, UserError
from utils.files.atomic import sync_directory, sync_tree
from utils.files.json_files import write_json
from utils.files.safetensors_files import safetensors_dtype
from utils.files.safetensors_writer import SAVE_DTYPES, write_safetensors
from utils.models.saving import STAGING_PREFIX
from utils.run.lineage import (
    FORMAT,
    STATE_FILE,
    TENSORS_FILE,
    UNET_FILE,
    Checkpoint,
    Line,
    discard,
    list_checkpoints,
    read_checkpoint,
)
from utils.training.eight_bit import EightBit
from utils.training.memory import free_host_memory

SCALARS = ("loss_scale", "num_good", "num_applied", "num_skipped")


class Checkpointer:
    """Writes checkpoints of an optimizer's state: a snapshot is taken at once, a thread brings it to the disk.

    Args:
        output_dir: where checkpoint-N goes.
        optimizer: the MasterWeightsOptimizer.
        unet_config: the bytes of the UNet's config.json.
        describe: what state.json says besides step and counters; called in the thread.
        save_dtype: "fp32" or "fp16", of the UNet's file.
        run_id, ancestors: the Line whose older checkpoints may be removed.
        total_limit: how many of them are kept; None: all.
        say: told one line about each checkpoint, in the thread that trains.
    """

    def __init__(
        self,
        output_dir: Path,
        optimizer,
        *,
        unet_config: bytes,
        describe: Callable[[], dict],
        save_dtype: str,
        run_id: str,
        total_limit: int | None,
        say: Callable[[str], None],
        ancestors: Sequence = (),
    ):
        self.output_dir, self.optimizer, self.flat = output_dir, optimizer, optimizer.flat
        self.unet_config, self.describe, self.save_dtype = unet_config, describe, save_dtype
        self.line, self.total_limit, self.say = Line(run_id, list(ancestors)), total_limit, say
        self.seconds = 0.0  # that the last write took
        self._thread: threading.Thread | None = None
        self._outcome: tuple[str, BaseException | None] | None = None
        self._host: dict[str, torch.Tensor] = {}

    def save(self, step: int) -> None:
        """Takes the state after `step` steps and starts writing it; waits only for the checkpoint before.

        Where the host's memory has no room for a copy of what is there already, it waits for this one.
        """
        self.wait()
        arrived = self._snapshot()
        self._thread = threading.Thread(target=self._write, args=(step, arrived), name=f"checkpoint-{step}")
        self._thread.start()
        if self._host["master"] is self.flat.master or self._host["exp_avg_sq"] is self.optimizer.exp_avg_sq:
            self._thread.join()

    def report(self) -> None:
        """Says how the last write went, if it is over."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> bool:
        """Waits for the write under way and says how it went; False where it failed."""
        if self._thread is None:
            return True
        line, is_written = self._join()
        self.say(line)
        return is_written

    def save_and_wait(self, step: int) -> None:
        """Writes the state after `step` steps before it returns; RunFailed if that cannot be done."""
        self.save(step)
        line, is_written = self._join()
        if not is_written:
            raise RunFailed(line)
        self.say(line)

    def _join(self) -> tuple[str, bool]:
        """Waits for the write under way: a line about it, and whether it succeeded."""
        self._thread.join()
        self._thread = None
        line, error = self._outcome
        if error is not None and not isinstance(error, (OSError, UserError)):
            raise error
        return line, error is None

    def _snapshot(self) -> Callable[[], None]:
        """Copies the state to the host; the function returned waits until it is there.

        What is offloaded is copied before this returns: later updates write to the same host memory.
        """
        optimizer, on_gpu = self.optimizer, self.flat.device.type == "cuda"
        state = dict(master=self.flat.master, exp_avg=optimizer.exp_avg, exp_avg_sq=optimizer.exp_avg_sq)
        state |= {name: getattr(optimizer, name) for name in SCALARS}
        self.flat.wait_for_device()
        for name, source in state.items():
            place = self._place(name, source, on_gpu)
            if isinstance(source, EightBit):
                source.read_into(place, self.flat.device)
            elif place is not source:
                place.copy_(source.detach(), non_blocking=True)
        self.flat.wait_for_device()
        if not on_gpu:
            return lambda: None
        event = torch.cuda.Event()  # later updates of the same stream run after the copies
        event.record()
        return event.synchronize

    def _place(self, name: str, source, on_gpu: bool) -> torch.Tensor:
        """Where a part of the state is copied to: the last checkpoint's place, or a new one, or nowhere (no room)."""
        eight_bit = isinstance(source, EightBit)
        arrives_later = on_gpu and (eight_bit or source.is_cuda)
        shape, dtype = (source.numel, torch.float32) if eight_bit else (source.shape, source.dtype)
        if self._host.get(name, source) is source:
            no_room = not eight_bit and not arrives_later and 2 * source.nbytes > free_host_memory()
            self._host[name] = source if no_room else torch.empty(shape, dtype=dtype, pin_memory=arrives_later)
        return self._host[name]

    def _write(self, step: int, arrived: Callable[[], None]) -> None:
        name, error, started = f"checkpoint-{step}", None, time.perf_counter()
        try:
            arrived()
            num_bytes = self._commit(step)
            self.seconds = time.perf_counter() - started
            line = f"{name}: {num_bytes / 1e9:.3g} GB written in {self.seconds:.1f} s"
        except BaseException as caught:
            error = caught
            line = f"{name} could not be written to {self.output_dir}: {getattr(caught, 'strerror', None) or caught}"
        self._outcome = line, error

    def _commit(self, step: int) -> int:
        """Assembles the checkpoint in a hidden folder, moves it into place, then removes those beyond the limit."""
        target = self.output_dir / f"checkpoint-{step}"
        staging = self.output_dir / f"{STAGING_PREFIX}{target.name}-{os.getpid()}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            (staging / "unet").mkdir(parents=True)
            self._fill(staging, step)
            sync_tree(staging)
            if os.path.lexists(target):
                if target.is_symlink() or read_checkpoint(target) is None:
                    raise UserError(f"{target} exists and is not this program's; move it away")
                discard(target)
            os.rename(staging, target)
            sync_directory(self.output_dir)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._remove_oldest(keep=step)
        return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())

    def _fill(self, folder: Path, step: int) -> None:
        named = self.flat.named
        (folder / "unet" / "config.json").write_bytes(self.unet_config)
        write_safetensors(folder / UNET_FILE, named(self._host["master"]), SAVE_DTYPES[self.save_dtype])
        kept = ("exp_avg", "exp_avg_sq") if self.save_dtype == "fp32" else ("master", "exp_avg", "exp_avg_sq")
        tensors = [(f"{part}.{name}", value) for part in kept for name, value in named(self._host[part])]
        write_safetensors(folder / TENSORS_FILE, tensors, torch.float32)
        state = dict(program=PROGRAM, format=FORMAT, step=step, **self.line._asdict())
        state["optimizer"] = {name: self._host[name].item() for name in SCALARS}
        write_json(folder / STATE_FILE, state | self.describe())

    def _remove_oldest(self, keep: int) -> None:
        if self.total_limit is None:
            return
        others = [found for found in list_checkpoints(self.output_dir, self.line) if found.step != keep]
        for checkpoint in others[: max(0, len(others) + 1 - self.total_limit)]:
            discard(checkpoint.path)


@torch.no_grad()
def restore(checkpoint: Checkpoint, optimizer) -> None:
    """Copies a checkpoint's state into the optimizer's own tensors, which a CUDA graph may refer to.

    Raises UserError where the files are damaged or of another model.
    """
    flat, path = optimizer.flat, checkpoint.path
    master_file = UNET_FILE if safetensors_dtype(path / UNET_FILE) == "F32" else TENSORS_FILE
    places = [("", flat.master)] if master_file == UNET_FILE else [("master.", flat.master)]
    _read_tensors(path / master_file, flat, places)
    for name in ("exp_avg", "exp_avg_sq"):
        moment = getattr(optimizer, name)
        values = torch.empty(moment.numel) if isinstance(moment, EightBit) else moment
        _read_tensors(path / TENSORS_FILE, flat, [(f"{name}.", values)])
        if values is not moment:
            moment.write_from(values, flat.device)
    if flat.weight is not flat.master:
        flat.weight.copy_(flat.master)
    for name in SCALARS:
        value = checkpoint.state.get("optimizer", {}).get(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{path / STATE_FILE}: {name} is {value!r}; resume from another checkpoint")
        getattr(optimizer, name).fill_(value)


def _read_tensors(file: Path, flat, places: list[tuple[str, torch.Tensor]]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            for prefix, buffer in places:
                for (name, _), view in zip(flat.parameters, flat.views(buffer), strict=True):
                    value = stored.get_tensor(prefix + name)
                    if value.shape != view.shape or value.dtype != torch.float32:
                        raise UserError(
                            f"{file}: {prefix + name} is not of this model; resume from another checkpoint"
                        )
                    view.copy_(value)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); resume from another checkpoint") from error
