"""What surrounds the steps: checkpoints, the wish to stop, steps that are not finite, and what is said then."""

import contextlib
import os
import signal
import sys
from argparse import Namespace

import torch.distributed as dist
from safetensors import SafetensorError

from utils.checkpoint import Checkpointer, restore
from utils.checkpoint_files import list_checkpoints
from utils.errors import RunFailed
from utils.export import export_single_file
from utils.out_of_memory import is_out_of_memory
from utils.pipeline import commit_pipeline, save_unet
from utils.ranks import EXIT_LOST_RANK, is_lost_rank, lost_rank_line
from utils.resume import Start, resume_command
from utils.run_inputs import base_files
from utils.signals import StopRequest
from utils.timing import mark

NONFINITE = 1  # as an exit code


class Guard:
    """A context around the training loop: resumes before it, checkpoints in it, and ends it early with a clear line.

    Args:
        args, argv, base: the arguments, as parsed and as given, and the BaseModel.
        start: from which checkpoint, if any.
        optimizer: the MasterWeightsOptimizer, whose state is restored here, in place.
        record, log: the RunRecord and the TrainingLog.
        num_steps: of the whole run.
    """

    def __init__(self, args: Namespace, argv: list[str], base, start: Start, optimizer, record, log, num_steps: int):
        self.args, self.base, self.start, self.record, self.log = args, base, start, record, log
        self.num_steps = num_steps
        self.first_step = start.checkpoint.step if start.checkpoint else 0
        self.is_main = dist.get_rank() == 0
        self.resume_command = resume_command(argv, dist.get_world_size())
        if start.checkpoint is not None:
            restore(start.checkpoint, optimizer)
            log.say(f"going on from {start.checkpoint.path}")
        self.stop = StopRequest(self.is_main)
        self.checkpointer = self._checkpointer(optimizer) if self.is_main else None

    def _checkpointer(self, optimizer) -> Checkpointer:
        return Checkpointer(
            self.args.output_dir,
            optimizer,
            unet_config=(self.base.folder / "unet" / "config.json").read_bytes(),
            describe=self.record.describe,
            save_dtype=self.args.save_dtype,
            **self.record.line._asdict(),
            total_limit=self.args.checkpoints_total_limit,
            say=self.log.say,
        )

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stop.close()
        if is_out_of_memory(error) and self.is_main:
            self.log.close()
        if is_lost_rank(error) and not isinstance(error, RunFailed):
            self._end_without_the_others()

    def _end_without_the_others(self) -> None:
        """Another rank has died: no collective can end any more, so neither can an orderly shutdown."""
        if self.is_main:
            with contextlib.suppress(Exception):
                self.checkpointer.wait()
            kept = self._how_to_go_on()
            print(f"\n{lost_rank_line()}. {kept}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST_RANK)

    def after_step(self, step: int) -> None:
        """To be called on every rank after step `step`, counted from 1; raises RunFailed where the run shall end."""
        code = self.stop.agreed(self._own_code())
        if code and step < self.num_steps:
            self._end(step, code)
        if self.checkpointer is None:
            return
        self.checkpointer.report()
        self.stop.checkpoint_seconds = self.checkpointer.seconds
        if step % self.args.checkpointing_steps == 0:
            self.log.flush()
            self.checkpointer.save(step)

    def _own_code(self) -> int:
        return NONFINITE if self.log.nonfinite_streak >= self.args.max_nonfinite_steps else 0

    def _end(self, step: int, code: int) -> None:
        """Keeps the state after step `step`, then raises RunFailed."""
        if self.is_main:
            self.log.flush()
            self.checkpointer.save_and_wait(step)
            self.log.close()
            self.record.write_status("stopped")
        self.stop.wait_for_all()
        if code != NONFINITE:
            how = f"stopped after step {step} of {self.num_steps} ({signal.Signals(code - 128).name})"
            raise RunFailed(f"{how}. {self._how_to_go_on()}", code)
        raise RunFailed(
            f"{self.args.max_nonfinite_steps} steps in a row had no finite gradient, up to step {step}; none of them "
            f"changed the weights, which are in {self.args.output_dir}/checkpoint-{step}. Try a smaller "
            f"--learning_rate, or --mixed_precision bf16 or no, with --resume_from_checkpoint and --allow_changes"
        )

    def _how_to_go_on(self) -> str:
        found = list_checkpoints(self.args.output_dir, self.record.line)
        if not found:
            return "There is no checkpoint yet: start the run again"
        return (
            f"The state after step {found[-1].step} is in {found[-1].path}; go on from it with:\n{self.resume_command}"
        )

    def finish(self) -> None:
        """On rank 0 puts the pipeline in its place; RunFailed, with the state kept, where that cannot be done."""
        self.log.flush()
        mark("trained")
        if self.stop.agreed_at_last(self._own_code()) == NONFINITE:
            self._end(self.num_steps, NONFINITE)
        if not self.is_main:
            self.stop.close()
            return
        self.checkpointer.wait()
        self.log.close()
        changed = [str(path) for path, now in base_files(self.base).items() if self.start.base_files.get(path) != now]
        changed += [str(path) for path in self.start.base_files if not path.exists()]
        if changed:
            self._fail(f"{changed[0]} has changed since the start, so the result would not be of one piece")
        try:
            self.args.output_dir.mkdir(parents=True, exist_ok=True)
            self._commit()
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            self._fail(f"the pipeline could not be written to {self.args.output_dir}: {reason}")

    def _commit(self) -> None:
        args, flat = self.args, self.checkpointer.flat
        commit_pipeline(
            args.output_dir,
            self.base.folder,
            lambda folder: save_unet(flat, folder, args.save_dtype, args.save_format),
        )
        if args.export_single_file:
            export_single_file(args.output_dir, args.export_single_file)
        mark("saved")
        print(self.record.finish(self.log), flush=True)

    def _fail(self, reason: str) -> None:
        with contextlib.suppress(RunFailed):
            self.checkpointer.save_and_wait(self.num_steps)
        raise RunFailed(f"{reason}. Mend that first. {self._how_to_go_on()}")
