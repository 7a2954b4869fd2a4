"""run.json: what was run, on what, with what result, and the command that repeats it."""

import json
import os
import platform
import shlex
import shutil
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import torch

from utils import PROGRAM
from utils.arguments import as_plain
from utils.data.concepts import Concept
from utils.files.hashing import in_background
from utils.files.json_files import write_json
from utils.files.ownership import RUN_FILE
from utils.models.saving import STAGING_PREFIX
from utils.run.fingerprint import determinants
from utils.run.lineage import discard, line_of, list_checkpoints, next_line
from utils.run.plan import Plan
from utils.run.resume import Start
from utils.runtime import timing

VERSIONED = ("torch", "colossalai", "diffusers", "transformers", "accelerate", "numpy", "Pillow", "safetensors")


class RunRecord:
    """Writes run.json at the start ("running") and at the end ("complete")."""

    def __init__(
        self,
        args: Namespace,
        argv: list[str],
        plan: Plan,
        dataset,
        device,
        *,
        is_main: bool,
        concepts: list[Concept],
        class_dataset,
        start: Start,
    ):
        self.args, self.plan, self.dataset, self.device = args, plan, dataset, device
        self.class_dataset = class_dataset
        self.started = time.perf_counter()
        checkpoint = start.checkpoint
        self.line = next_line(args.output_dir, checkpoint)
        if not is_main:
            return
        script = "train_dreambooth_colossalai.py"
        command = ["torchrun", "--nproc_per_node", str(plan.num_ranks), script, *argv]
        self.entries = dict(
            run_id=self.line.run_id,
            ancestors=self.line.ancestors,
            resumed_from=str(checkpoint.path) if checkpoint else None,
            command=shlex.join(command),
            arguments=as_plain(args),
            seed=args.seed,
            num_ranks=plan.num_ranks,
            device=device_name(device),
            versions=versions(),
            photos=[photo_entry(photo, args.instance_prompt) for photo in dataset.photos],
            class_images=[] if class_dataset is None else class_dataset.record(),
            skipped_files=[dict(file=path.name, reason=reason) for path, reason in dataset.skipped],
            started_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        continues = checkpoint is not None and line_of(read_record(args.output_dir)).holds(checkpoint)
        start_output(args.output_dir, self.entries, continues)  # another run's record and metrics are set aside
        self._base_hashes = start.base_hashes
        # Once and now: what it reads may have moved when a checkpoint asks for it.
        self._determines = in_background(
            lambda: determinants(args, plan.num_ranks, concepts, dataset, start.base_hashes.result())
        )

    def describe(self) -> dict:
        """What a checkpoint of this run says about it; waits for the hashes of what it is made from."""
        return dict(
            determines=self._determines.result(),
            arguments=self.entries["arguments"],
            device=self.entries["device"],
            versions=self.entries["versions"],
            written_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )

    def write_status(self, status: str) -> None:
        """Brings run.json up to date."""
        write_json(self.args.output_dir / RUN_FILE, {"program": PROGRAM, "status": status, **self.entries})

    def summary(self) -> str:
        """The run in a few lines, for its beginning."""
        args, plan = self.args, self.plan
        skipped = [f"skipped {path.name!r}: {reason}" for path, reason in self.dataset.skipped]
        spread = (args.train_batch_size, args.gradient_accumulation_steps, plan.num_ranks)
        precision = "fp32" if args.mixed_precision == "no" else args.mixed_precision
        return "\n".join(
            [
                f"{len(self.dataset)} photos at {args.resolution} px, {self._prompts()}",
                *self._class_images(),
                *skipped,
                f"{plan.num_steps} steps of {plan.samples_per_step} samples "
                "(batch {} x {} micro-batches x {} ranks)".format(*spread),
                f"lr {max(plan.learning_rates):g} ({args.lr_scheduler}), {precision} on {device_name(self.device)}",
            ]
        )

    def _prompts(self) -> str:
        prompts = list(dict.fromkeys(photo.prompt for photo in self.dataset.photos))
        shown = ", ".join(repr(prompt) for prompt in prompts[:4]) + (", ..." if len(prompts) > 4 else "")
        return f"{'prompt' if len(prompts) == 1 else f'{len(prompts)} prompts'} {shown}"

    def _class_images(self) -> list[str]:
        if self.class_dataset is None:
            return []
        weight = self.args.prior_loss_weight
        return [f"{len(self.class_dataset)} class images, one beside each photo, their loss times {weight:g}"]

    def finish(self, log) -> str:
        """Marks the run complete in run.json; returns the closing line."""
        seconds = time.perf_counter() - self.started
        self.entries["base_model"] = self._base_hashes.result()
        self.entries["result"] = dict(
            num_steps=self.plan.num_steps,
            num_skipped=log.num_skipped,
            final_loss=log.smoothed_loss,
            seconds=round(seconds, 2),
            seconds_after_start=timing.clock.marks,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        )
        self.write_status("complete")
        self._remove_earlier_runs()
        skipped = f", {log.num_skipped} skipped for overflow" if log.num_skipped else ""
        return (
            f"{self.plan.num_steps} steps in {seconds:.1f} s{skipped}; the pipeline is in {self.args.output_dir} "
            f"(DiffusionPipeline.from_pretrained loads it, evaluate.py samples it)"
        )

    def _remove_earlier_runs(self) -> None:
        """What was kept of an earlier run in this folder until its result was replaced."""
        for path in self.args.output_dir.glob(f"*{PREVIOUS_SUFFIX}"):
            if path.name in PREVIOUS_NAMES:
                path.unlink()
        for checkpoint in list_checkpoints(self.args.output_dir):
            if not self.line.holds(checkpoint):
                discard(checkpoint.path)


def photo_entry(photo, instance_prompt: str | None) -> dict:
    """A photo in run.json; its prompt and folder are named where the flags do not say them."""
    entry = dict(file=photo.path.name, size=photo.original_size, sha256=photo.sha256)
    if photo.prompt != instance_prompt:
        entry.update(folder=str(photo.path.parent), prompt=photo.prompt)
    return entry


def versions(names: tuple[str, ...] = VERSIONED) -> dict[str, str]:
    """Python's and the installed packages' versions."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name and CUDA version, or the CPU's architecture and thread count."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


METRICS_FILE = "metrics.jsonl"


PREVIOUS_SUFFIX = ".previous"


PREVIOUS_NAMES = (f"{RUN_FILE}{PREVIOUS_SUFFIX}", f"{METRICS_FILE}{PREVIOUS_SUFFIX}")


def start_output(output_dir: Path, run: dict, continues: bool = False) -> None:
    """Claims the output folder: makes it where needed and writes run.json. An earlier result in it stays loadable.

    `continues` says that the folder's metrics.jsonl, up to the step from which the run goes on, is the run's own.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for leftover in output_dir.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not continues:
        _set_aside(output_dir, run.get("run_id"))
    write_json(output_dir / RUN_FILE, {"program": PROGRAM, "status": "running", **run})


def read_record(output_dir: Path) -> dict:
    """The run.json of an output folder; empty where there is none that can be read."""
    try:
        record = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _set_aside(output_dir: Path, run_id: str | None) -> None:
    """Keeps a finished run's run.json and metrics.jsonl under other names until its result is replaced."""
    record = read_record(output_dir)
    if not record or record.get("run_id") == run_id:
        return
    if record.get("status") == "complete":
        shutil.copyfile(output_dir / RUN_FILE, output_dir / f"{RUN_FILE}{PREVIOUS_SUFFIX}")
        if (output_dir / METRICS_FILE).exists():
            os.replace(output_dir / METRICS_FILE, output_dir / f"{METRICS_FILE}{PREVIOUS_SUFFIX}")
    else:
        (output_dir / METRICS_FILE).unlink(missing_ok=True)
