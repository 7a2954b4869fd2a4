"""run.json: what was run, on what, with what result, and the command that repeats it."""

import contextlib
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from utils import PROGRAM
from utils.dataset import ClassDataset, Photo
from utils.files import ownership
from utils.files.atomic import move, replace_path
from utils.files.hashing import in_background
from utils.files.json_files import write_json
from utils.files.ownership import RUN_FILE, run_of
from utils.run.lineage import discard, lineage_of, list_checkpoints, next_lineage
from utils.run.logs import TrainingLog
from utils.run.plan import Plan
from utils.run.resume import Sources, determinants, training_defaults
from utils.runtime import environment, process
from utils.runtime.process import typed, versions


class RunRecord:
    """Writes run.json at the start ("running") and at the end ("complete"); on rank 0."""

    def __init__(
        self, plan: Plan, sources: Sources, class_dataset: ClassDataset | None, argv: list[str], device: torch.device
    ):
        self.plan, self.sources, self.class_dataset, self.device = plan, sources, class_dataset, device
        self.lineage = next_lineage(plan.output_dir, sources.checkpoint, is_changed=bool(sources.changes))
        self.started = time.perf_counter()
        dataset, checkpoint = sources.dataset, sources.checkpoint
        script = "train_dreambooth_colossalai.py"
        command = ["torchrun", *environment.torchrun_flags(), script, *argv]
        prompt = plan.arguments["instance_prompt"]
        self.entries: dict[str, Any] = dict(
            **self.lineage._asdict(),
            resumed_from=str(checkpoint.path) if checkpoint else None,
            command=shlex.join(command),
            launch=environment.launch(),
            arguments=plan.arguments,
            defaults=training_defaults(plan.arguments),
            used=used_arguments(plan),
            changes=all_changes(sources),
            seed=plan.seed,
            num_ranks=plan.num_ranks,
            samples_per_step=plan.samples_per_step,
            optimizer="AdamW8bit" if plan.optimizer["use_8bit_adam"] else "AdamW",
            device=device_name(device),
            versions=versions(),
            photos=[photo_entry(photo, prompt) for photo in dataset.photos],
            class_images=[] if class_dataset is None else class_dataset.record(),
            skipped_files=[dict(file=path.name, reason=reason) for path, reason in dataset.skipped],
            started_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )

    def begin(self) -> None:
        """Claims the output folder, and starts to hash what the run is made from, which may move later."""
        output_dir, checkpoint = self.plan.output_dir, self.sources.checkpoint
        continues = checkpoint is not None and lineage_of(run_of(output_dir)).holds(checkpoint)
        start_output(output_dir, self.entries, continues)  # another run's record and logs are set aside
        self._determines = in_background(self._determinants)

    def _base_hashes(self) -> dict[str, Any]:
        hashes = self.sources.base_hashes
        assert hashes is not None, "rank 0 of a run hashes its base"
        return hashes.result()

    def _determinants(self) -> dict:
        class_images = [path for path, _ in self.class_dataset.images] if self.class_dataset else []
        return determinants(self.plan, class_images, self.sources.dataset, self._base_hashes())

    def describe(self) -> dict:
        """What a checkpoint of this run says about it; waits for the hashes of what it is made from."""
        run = {name: self.entries[name] for name in ("arguments", "changes", "device", "versions")}
        return dict(determines=self._determines.result(), **run, written_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def write_status(self, status: str) -> None:
        """Brings run.json up to date."""
        write_json(self.plan.output_dir / RUN_FILE, {"program": PROGRAM, "status": status, **self.entries})

    def stop(self) -> None:
        """Says in run.json that the run has ended early, unless its result is in place; a full disk is no matter."""
        if "result" not in self.entries:
            with contextlib.suppress(OSError):
                self.write_status("stopped")

    def summary(self, learning_rate: float) -> str:
        """The run in a few lines, for its beginning; `learning_rate` is its largest."""
        plan, arguments, dataset = self.plan, self.plan.arguments, self.sources.dataset
        factors = {"micro-batches": arguments["gradient_accumulation_steps"], "ranks": plan.num_ranks}
        many = [f"{number} {name}" for name, number in factors.items() if number > 1]
        spread = " x ".join([f"batch {arguments['train_batch_size']}", *many])
        precision = "fp32" if plan.mixed_precision == "no" else plan.mixed_precision
        prompts = list(dict.fromkeys(photo.prompt for photo in dataset.photos))
        shown = ", ".join(map(repr, prompts[:4])) + (", ..." if len(prompts) > 4 else "")
        counted = "prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
        lines = [f"{len(dataset)} photos at {dataset.resolution} px, {counted} {shown}"]
        if self.class_dataset is not None:
            count, weight = len(self.class_dataset), arguments["prior_loss_weight"]
            lines.append(f"{count} class images, one beside each photo, their loss times {weight:g}")
        lines.append(
            f"{plan.num_steps} steps of {plan.samples_per_step} samples ({spread}), lr {learning_rate:g} "
            f"({arguments['lr_scheduler']}), {precision} on {device_name(self.device)}"
        )
        return "\n".join(lines)

    def finish(self, log: TrainingLog) -> str:
        """Marks the run complete in run.json; returns the closing line."""
        plan, seconds = self.plan, time.perf_counter() - self.started
        num_steps_now = plan.num_steps - self.sources.first_step
        self.entries |= dict(base_model=self._base_hashes(), determines=self._determines.result())
        self.entries["result"] = dict(
            num_steps=plan.num_steps,
            num_steps_now=num_steps_now,  # the others were made before: `seconds` are without them
            num_skipped=log.num_skipped,
            final_loss=log.smoothed_loss,
            seconds=round(seconds, 2),
            seconds_after_start=process.marks,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        )
        self.write_status("complete")
        self._remove_earlier_runs()
        skipped = f", {log.num_skipped} skipped for overflow" if log.num_skipped else ""
        now = f", {num_steps_now} of them now," if self.sources.checkpoint else ""
        said = f"{plan.num_steps} steps{now} in {seconds:.1f} s{skipped}; the pipeline is in {plan.output_dir}"
        if environment.draws_afterwards() is not None:
            return said
        return f"{said}.\nTo draw it beside the base, with scores:\n  {self._next_command()}"

    def _next_command(self) -> str:
        """The command line that evaluates the result, from the folder that the training was started in."""
        script, folder = Path(sys.argv[0]), str(self.plan.output_dir)
        evaluate = script.with_name("evaluate.py") if script.name.startswith("train_dream") else Path("evaluate.py")
        return shlex.join([typed("python"), str(evaluate), "--finetuned_model_name_or_path", folder])

    def _remove_earlier_runs(self) -> None:
        """What was kept of another run in this folder until its result was replaced."""
        for name in ownership.PREVIOUS_NAMES:
            _remove(self.plan.output_dir / name)
        for checkpoint in list_checkpoints(self.plan.output_dir):
            if not self.lineage.holds(checkpoint):
                discard(checkpoint.path)


def used_arguments(plan: Plan) -> dict[str, Any]:
    """Flags whose values were not used as they were given, with those that make the same run."""
    found: dict[str, Any] = dict(learning_rate=plan.learning_rates["lr"], scale_lr=False)
    if plan.arguments["lr_scheduler"] == "constant":
        found["lr_warmup_steps"] = 0
    return {name: value for name, value in found.items() if plan.arguments[name] != value}


def all_changes(sources: Sources) -> list[dict[str, Any]]:
    """What --allow_changes let change in a run: the step after which, and `differences`; of all its starts."""
    if sources.checkpoint is None:
        return []
    now = [dict(step=sources.checkpoint.step, changed=sources.changes)] if sources.changes else []
    return [*sources.checkpoint.state.get("changes", []), *now]


def photo_entry(photo: Photo, instance_prompt: str | None) -> dict:
    """A photo in run.json; its prompt and folder are named if the flags do not say them."""
    entry: dict[str, Any] = dict(file=photo.path.name, size=photo.original_size, sha256=photo.sha256)
    if photo.prompt != instance_prompt:
        entry.update(folder=str(photo.path.parent), prompt=photo.prompt)
    return entry


def device_name(device: torch.device) -> str:
    """The GPU's name and CUDA version, or the CPU's architecture and thread count."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def start_output(output_dir: Path, run: dict, continues: bool = False) -> None:
    """Claims the output folder and writes run.json; logs of a run that this one does not continue are set aside."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for leftover in filter(lambda path: ownership.is_half_written(path.name), list(output_dir.iterdir())):
        with contextlib.suppress(OSError):
            leftover.unlink() if leftover.is_symlink() or leftover.is_file() else shutil.rmtree(leftover)
    if not continues:
        _set_aside(output_dir, run.get("run_id"))
    write_json(output_dir / RUN_FILE, {"program": PROGRAM, "status": "running", **run})


def _set_aside(output_dir: Path, run_id: str | None) -> None:
    """Keeps a finished run's run.json and logs under other names until its result is replaced."""
    record = run_of(output_dir)
    if not record or record.get("run_id") == run_id:
        return
    is_kept = record.get("status") == "complete"
    if is_kept:
        replace_path(
            output_dir / ownership.PREVIOUS_NAMES[0], lambda part: shutil.copyfile(output_dir / RUN_FILE, part)
        )
    for path in (output_dir / name for name in ownership.LOGS):
        previous = path.with_name(f"{path.name}{ownership.PREVIOUS_SUFFIX}")
        if is_kept and path.exists():
            _remove(previous)
            _move(path, previous)
        elif not is_kept:
            _remove(path)


def _move(path: Path, target: Path) -> None:
    """A file or a link, or a folder's validation pictures; what else is in the folder stays."""
    if path.is_symlink() or not path.is_dir():
        move(path, target)
        return
    target.mkdir(exist_ok=True)
    for picture in path.glob(ownership.VALIDATION_PICTURES):
        move(picture, target / picture.name)
    _remove(path)


def _remove(path: Path) -> None:
    """A file or a link if it is there, or a folder's validation pictures, and the folder if nothing else is in it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for picture in path.glob(ownership.VALIDATION_PICTURES):
        picture.unlink()
    with contextlib.suppress(OSError):  # somebody's own file, or a link
        path.rmdir()
