"""A run from its first model to its last file: what surrounds it, what is done between its steps, how it ends."""

import contextlib
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from utils.dataset import ClassDataset
from utils.errors import RunFailed, UserError, reason_of
from utils.files.lock import hold_output
from utils.files.ownership import RUN_FILE
from utils.models.card import CARD_FILE, write_card
from utils.models.folder import BaseModel, read_base
from utils.models.saving import commit_pipeline, save_unet
from utils.models.single_file import export_single_file
from utils.run.checkpoint import Checkpointer, restore
from utils.run.lineage import list_checkpoints
from utils.run.logs import TrainingLog
from utils.run.plan import Plan
from utils.run.record import RunRecord
from utils.run.resume import Sources, changed_file, differences, rank_inputs, resume_command
from utils.runtime.colossal import barrier, get_accelerator, launch, leave
from utils.runtime.determinism import deterministic_kernels
from utils.runtime.environment import is_main
from utils.runtime.process import mark, typed_module
from utils.runtime.ranks import EXIT_LOST_RANK, StopRequest, is_lost_rank, lost_rank_in_one_line, lost_rank_line
from utils.training.memory import is_out_of_memory, out_of_memory_in_one_line
from utils.training.optimizer import MasterWeightsOptimizer
from utils.training.train_step import training_stream

MOST_GROWTH = 2.0  # of the weights' norm: beyond it they have moved further than they were large
NONFINITE = 1  # why a run ends, as its exit code; the other reasons are signals, 128 + their number


@contextlib.contextmanager
def session(plan: Plan, sources: Sources) -> Iterator[torch.device]:
    """Holds the output folder, joins the ranks, yields the device, waits at the end; an early end is one line."""
    with contextlib.ExitStack() as surroundings:

        def ready() -> dict:
            surroundings.enter_context(hold_output(plan.output_dir, is_main()))
            return rank_inputs(plan, sources) if plan.num_ranks > 1 else {}

        with lost_rank_in_one_line():
            launch(plan.seed, ready, differences)
        surroundings.callback(leave)
        device = get_accelerator().get_current_device()
        surroundings.enter_context(deterministic_kernels(plan.deterministic))
        surroundings.enter_context(lost_rank_in_one_line())
        surroundings.enter_context(training_stream(device))
        surroundings.enter_context(out_of_memory_in_one_line(plan.needs))
        yield device
        barrier(device)


class TrainingRun:
    """One run in its output folder: resumes, logs, writes checkpoints, and ends early with a clear line if it must.

    `with run:` restores the state and listens to signals; `run.log` can be used before it.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        class_dataset: ClassDataset | None,
        argv: list[str],
        optimizer: MasterWeightsOptimizer,
        device: torch.device,
    ):
        self.plan, self.sources, self.optimizer = plan, sources, optimizer
        self.is_main = dist.get_rank() == 0
        self.resume_command = resume_command(argv)
        self.first_step = sources.first_step
        self.record = RunRecord(plan, sources, class_dataset, argv, device)
        if self.is_main:
            self.record.begin()
            print(self.record.summary(optimizer.learning_rates.max().item()), flush=True)
        self.log = TrainingLog(plan, self.first_step, device, is_main=self.is_main)
        self._base_norm = optimizer.flat.norm()
        self._lost: dict[int, str] = {}

    def __enter__(self) -> "TrainingRun":
        checkpoint = self.sources.checkpoint
        if checkpoint is not None:
            try:
                restore(checkpoint, self.optimizer)
                if why := self._why_lost(self.first_step):
                    raise UserError(f"{checkpoint.path}: its weights are {why}; resume from an earlier checkpoint")
            except UserError:
                self.record.stop()
                raise
            self.log.say(f"resuming from {checkpoint.path}")
        self.stop = StopRequest(self.is_main)
        self.checkpointer = None
        if self.is_main:
            self.checkpointer = Checkpointer(
                self.plan.output_dir,
                self.optimizer,
                unet_config=(self.sources.base.folder / "unet" / "config.json").read_bytes(),
                describe=self.record.describe,
                lineage=self.record.lineage,
                say=self.log.say,
                **self.plan.checkpoints,
            )
        return self

    def steps(self) -> Iterator[int]:
        """The global steps that are left, from 0. After each the run stops if it must, and saves if it is time."""
        for step in range(self.first_step, self.plan.num_steps):
            yield step
            code = self.stop.poll(self._failure())
            if code and step + 1 < self.plan.num_steps:
                self._end_early(step + 1, code)
            self._checkpoint_if_due(step + 1)

    def _checkpoint_if_due(self, num_steps: int) -> None:
        is_due = num_steps % self.plan.checkpointing_steps == 0
        if is_due and self._why_lost(num_steps):  # on every rank alike
            self._end_early(num_steps, NONFINITE)
        if self.checkpointer is None:
            return
        self.checkpointer.report()
        self.stop.checkpoint_seconds = self.checkpointer.seconds
        if is_due:
            self.log.flush()
            self.checkpointer.save(num_steps)

    def _failure(self) -> int:
        return NONFINITE if self.log.nonfinite_streak >= self.plan.max_nonfinite_steps else 0

    def _failure_at_the_end(self) -> int:
        """As _failure, also if the weights are lost, or if half of the steps or more had no finite loss at the end."""
        num_lost = self.plan.num_steps - self.log.last_finite if self.is_main else 0  # the others keep no log
        num_steps = self.plan.num_steps - self.first_step
        return NONFINITE if (0 < num_steps <= 2 * num_lost) or self._why_lost(self.plan.num_steps) else self._failure()

    def _why_lost(self, num_steps: int) -> str:
        """What is wrong with the weights after so many steps, if nothing can be drawn with them; measured once."""
        if num_steps not in self._lost:
            growth = self.optimizer.flat.norm() / self._base_norm
            why = f"{growth:.3g} times as large as the base's" if math.isfinite(growth) else "not finite"
            self._lost = {num_steps: "" if growth <= MOST_GROWTH else why}
        return self._lost[num_steps]

    def _end_early(self, num_steps: int, code: int) -> None:
        """Keeps the state after `num_steps` steps, unless the weights are lost, then raises RunFailed."""
        why = self._why_lost(num_steps)
        if self.checkpointer is not None:
            self.log.flush()
            self.checkpointer.wait() if why else self.checkpointer.save_and_wait(num_steps)
            self.log.close()
        self.stop.wait_for_all()
        if why:
            raise RunFailed(
                f"the weights after step {num_steps} are {why}, and are not kept: --learning_rate is too large. "
                f"Give a smaller one, with --allow_changes if you resume. {self._how_to_resume()}"
            )
        if code != NONFINITE:
            how = f"stopped after step {num_steps} of {self.plan.num_steps} ({signal.Signals(code - 128).name})"
            raise RunFailed(f"{how}. {self._how_to_resume()}", code)
        found = list_checkpoints(self.plan.output_dir, self.record.lineage)
        earlier = [each.path for each in found if each.step < self.log.last_finite]  # a finite loss came after it
        last_good = f" (the last one that a finite loss came after: {earlier[-1]})" if earlier else ""
        raise RunFailed(
            f"{self.log.nonfinite_streak} steps in a row had no finite gradient, up to step {num_steps}; none of them "
            f"changed the weights, which are in {self.plan.output_dir}/checkpoint-{num_steps}{last_good}. Try a "
            f"smaller --learning_rate, or --mixed_precision bf16 or no, with --resume_from_checkpoint and "
            f"--allow_changes"
        )

    def _how_to_resume(self) -> str:
        found = list_checkpoints(self.plan.output_dir, self.record.lineage)
        if not found:
            return "There is no checkpoint yet: start the run again"
        return f"The state after step {found[-1].step} is in {found[-1].path}; resume with:\n{self.resume_command}"

    def save_pipeline(self) -> None:
        """On rank 0 puts the pipeline in its place; RunFailed, with the state kept, if that cannot be done."""
        self.log.flush()
        mark("trained")
        if self.stop.poll_at_the_end(self._failure_at_the_end()) == NONFINITE:
            self._end_early(self.plan.num_steps, NONFINITE)
        if self.checkpointer is None:
            return
        self.checkpointer.wait()
        self.log.close()
        if changed := changed_file(self.sources):
            self._fail(f"{changed} has changed since the start, so the result would not be of one piece")
        try:
            self.plan.output_dir.mkdir(parents=True, exist_ok=True)
            result = self._write_pipeline()
        except (OSError, SafetensorError) as error:
            self._fail(f"the pipeline could not be written to {self.plan.output_dir}: {reason_of(error)}")
        self._finish(result)

    def _write_pipeline(self) -> BaseModel:
        plan, flat = self.plan, self.optimizer.flat
        flat.wait_for_device()
        commit_pipeline(
            plan.output_dir,
            self.sources.base,
            lambda folder: save_unet(flat.named_masters(), folder, plan.save_dtype, plan.save_format),
        )
        mark("saved")
        return read_base(plan.output_dir)

    def _finish(self, result: BaseModel) -> None:
        """What tells of a pipeline that is in its place, then what is made from it; RunFailed names what failed."""
        file, again = result.folder / RUN_FILE, ""
        try:
            closing = self.record.finish(self.log)
            try:
                write_card(result)
            except Exception as error:  # with words of others in it, the base's card's: it only costs ours
                print(f"note: {result.folder / CARD_FILE} could not be written: {reason_of(error)}", file=sys.stderr)
            if self.plan.export_single_file:
                file = self.plan.export_single_file
                words = [*typed_module("utils.export"), str(result.folder), str(file)]
                again = f"; to write it again:\n{shlex.join(words)}"
                export_single_file(result, file)
        except (OSError, SafetensorError) as error:
            whole = f"The pipeline is whole, in {result.folder}"
            raise RunFailed(f"{file} could not be written: {reason_of(error)}. {whole}{again}") from error
        print(closing, flush=True)

    def _fail(self, reason: str) -> None:
        if self.checkpointer is not None:
            with contextlib.suppress(RunFailed):
                self.checkpointer.save_and_wait(self.plan.num_steps)
        raise RunFailed(f"{reason}. Fix that first. {self._how_to_resume()}")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.stop.close()
        if error is not None and self.is_main:
            self.record.stop()
        if is_out_of_memory(error) and self.is_main:
            self.log.close()
        if is_lost_rank(error) and not isinstance(error, RunFailed):
            if self.checkpointer is not None:
                with contextlib.suppress(Exception):
                    self.checkpointer.wait()
                print(f"\n{lost_rank_line()}. {self._how_to_resume()}", file=sys.stderr, flush=True)
            os._exit(EXIT_LOST_RANK)  # no collective can end any more, so neither can an orderly shutdown
