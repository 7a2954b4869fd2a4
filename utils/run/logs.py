"""What a run tells while it trains: progress bar, metrics.jsonl, TensorBoard."""

import collections
import contextlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.files.json_files import keep_rows
from utils.files.ownership import METRICS_FILE, VALIDATION_FILE, VALIDATION_FOLDER, VALIDATION_PICTURES
from utils.files.png import save_png
from utils.run.plan import Plan
from utils.runtime import environment, process
from utils.runtime.process import mark, progress_bar
from utils.training.train_step import METRICS

LOSS_SMOOTHING = 0.95
TENSORBOARD = "TensorBoard's files"
STEPS_TO_TELL = 8  # after so many steps it is said how long all will take; the first three may be slower
OF_A_SAMPLE = 0.5  # of a training step's sample is a picture's denoising step: on a CPU, and at batch 4 on an H100
MAX_STEPS_BEHIND = 8  # how many steps the GPU's results may lag before they are waited for


def in_words(seconds: float) -> str:
    """A duration as people say it: '40 s', '4 min', '2.5 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


class TrainingLog:
    """One rank's view of the training: rank 0 shows and writes, the others do neither.

    Steps hand in device scalars; they are copied asynchronously and written when they have arrived, so that logging
    does not make the GPU wait.
    """

    def __init__(self, plan: Plan, first_step: int, device: torch.device, *, is_main: bool):
        self.plan, self.device, self.is_main = plan, device, is_main
        self.smoothed_loss: float | None = None
        self.num_skipped = 0
        self.nonfinite_streak = 0  # steps in a row that were not applied, as far as results have arrived
        self.last_finite = first_step  # the last step whose loss was finite, likewise
        self._pending: collections.deque = collections.deque()
        self._first_times: list[float] = []  # seconds of the steps until it is said how long all will take
        self._last_time = time.perf_counter()
        self._tensorboard: Any = None
        self._with_gaps: set[str] = set()  # of what is written, that which was not
        if is_main:
            self._open(first_step)

    def _open(self, first_step: int) -> None:
        output_dir, arguments = self.plan.output_dir, self.plan.arguments
        if self.plan.validation["every"] or (output_dir / VALIDATION_FILE).exists():
            keep_rows(output_dir / VALIDATION_FILE, first_step, {"validation_loss"})
        for picture in (output_dir / VALIDATION_FOLDER).glob(VALIDATION_PICTURES):
            if (step := re.match(r"step-(\d+)-", picture.name)) and int(step[1]) > first_step:
                picture.unlink()
        path = output_dir / METRICS_FILE
        for row in keep_rows(path, first_step, {"loss", "skipped"}):
            self._count(float(row["loss"]), row["skipped"])
        self.nonfinite_streak = 0  # the steps before a resume do not stop the run that goes on
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._bar = progress_bar("training", self.plan.num_steps, "step", done=first_step)
        if arguments["report_to"] == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(output_dir / arguments["logging_dir"]), purge_step=first_step + 1)
            rows = [f"| {name} | {value} |" for name, value in arguments.items()]
            self._tensorboard.add_text("settings", "\n".join(["| flag | value |", "|---|---|", *rows]), first_step)

    def step(self, global_step: int, metrics: torch.Tensor) -> None:
        """Takes the metrics (train_step.METRICS) of step `global_step`, counted from 1."""
        if not self.is_main:
            return
        event = None
        if self.device.type == "cuda":
            pinned = torch.empty(metrics.shape, dtype=metrics.dtype, pin_memory=True)
            metrics = pinned.copy_(metrics, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((global_step, metrics, event))
        self._drain(MAX_STEPS_BEHIND)

    def _drain(self, max_behind: int) -> None:
        while self._pending:
            global_step, metrics, event = self._pending[0]
            if event is not None and not event.query():
                if len(self._pending) <= max_behind:
                    return
                event.synchronize()
            self._pending.popleft()
            self._write(global_step, dict(zip(METRICS, metrics.tolist(), strict=True)))

    def _write(self, global_step: int, row: dict) -> None:
        now = time.perf_counter()
        mark("first step")
        if self.plan.class_images is None:
            del row["instance_loss"], row["class_loss"]
        row["step_time"], self._last_time = now - self._last_time, now
        row["skipped"] = bool(row["skipped"])
        self._count(row["loss"], row["skipped"])
        self.last_finite = global_step if math.isfinite(row["loss"]) else self.last_finite
        plain = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
        with self._gaps_in(self._file.name):
            self._file.write(json.dumps({"step": global_step, **plain}) + "\n")
        shown = row | {"samples_per_second": self.plan.samples_per_step / max(row["step_time"], 1e-9)}
        if self.device.type == "cuda":
            shown["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        for name, value in shown.items():
            self._board("add_scalar", f"train/{name}", value, global_step)
        self._bar.set_postfix(self._postfix(row), refresh=False)
        self._bar.update(1)
        self._tell_how_long(global_step, row["step_time"])

    def _tell_how_long(self, global_step: int, step_time: float) -> None:
        """Under run.sh, once: about how long it is from the start of this process to the end of the evaluation."""
        draws = environment.draws_afterwards()
        if draws is None or len(self._first_times) == STEPS_TO_TELL:
            return
        self._first_times.append(step_time)
        if len(self._first_times) == STEPS_TO_TELL:
            seconds = statistics.median(self._first_times[3:])
            drawn = draws * OF_A_SAMPLE * self.plan.num_ranks / self.plan.samples_per_step
            left = (self.plan.num_steps - global_step + drawn) * seconds
            start = process.marks["first step"]  # the evaluation's is about as long
            self.say(f"about {in_words(process.seconds_so_far() + left + start)} in all")

    @contextlib.contextmanager
    def _gaps_in(self, written: str) -> Iterator[None]:
        """A full disk does not end the training: only its record has gaps, which is said once."""
        try:
            yield
        except OSError as error:
            if written not in self._with_gaps:
                self.say(f"{written} could not be written ({error.strerror or error}); the training continues")
            self._with_gaps.add(written)

    def _board(self, method: str, *values: Any, **options: Any) -> None:
        if self._tensorboard is not None:
            with self._gaps_in(TENSORBOARD):
                getattr(self._tensorboard, method)(*values, **options)

    def _count(self, loss: float, skipped: bool) -> None:
        self.num_skipped += skipped
        self.nonfinite_streak = self.nonfinite_streak + 1 if skipped or not math.isfinite(loss) else 0
        if self.smoothed_loss is None:
            self.smoothed_loss = loss if math.isfinite(loss) else None
        elif math.isfinite(loss):
            self.smoothed_loss = LOSS_SMOOTHING * self.smoothed_loss + (1 - LOSS_SMOOTHING) * loss

    def _postfix(self, row: dict) -> dict[str, str]:
        loss = self.smoothed_loss if math.isfinite(row["loss"]) and self.smoothed_loss is not None else math.nan
        shown = {"loss": f"{loss:.4f}", "lr": f"{row['lr']:.1e}"}
        if self.device.type == "cuda":
            shown["peak"] = f"{torch.cuda.max_memory_allocated(self.device) / 1e9:.1f}GB"
        if row["loss_scale"] != 1:
            shown["scale"] = f"{row['loss_scale']:g}"
        if self.num_skipped:
            shown["skipped"] = str(self.num_skipped)
        return shown

    def validation(self, step: int, validate: Callable[[], tuple[float, list[Image.Image]]]) -> None:
        """Keeps the loss, and each prompt's images with the seeds --seed, ... + 1, ...; rank 0 only."""
        self._drain(0)  # what it takes is no step's time
        loss, images = validate()
        self.say(f"step {step}: validation loss {loss:.4f}")
        path, folder = self.plan.output_dir / VALIDATION_FILE, self.plan.output_dir / VALIDATION_FOLDER
        with self._gaps_in(str(path)), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "validation_loss": loss}) + "\n")
        self._board("add_scalar", "validation/loss", loss, step)
        for place, image in enumerate(images):
            prompt, number = divmod(place, self.plan.validation["num_images"])
            of_prompt = f"-prompt-{prompt + 1}" if prompt else ""
            with self._gaps_in(str(folder)):
                folder.mkdir(exist_ok=True)
                save_png(folder / f"step-{step:06d}{of_prompt}-seed-{self.plan.seed + number}.png", image)
            self._board("add_image", f"validation{of_prompt}/{number}", np.asarray(image), step, dataformats="HWC")
        self._last_time = time.perf_counter()

    def say(self, line: str) -> None:
        """A line that does not break the progress bar, also when that is closed; rank 0 only."""
        if self.is_main:
            self._bar.write(line, file=sys.stderr)

    def flush(self) -> None:
        """Waits for the results of all steps so far and brings metrics.jsonl to the disk."""
        if not self.is_main:
            return
        self._drain(0)
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Waits for the last steps' results and closes the files."""
        if not self.is_main:
            return
        self._drain(0)
        self._bar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._board("close")
