"""run.json: what was run, on what, with what result, and the command that repeats it."""

import hashlib
import math
import platform
import shlex
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from utils import timing
from utils.arguments import as_plain
from utils.models import WEIGHT_DTYPES
from utils.optimizer import learning_rate_table
from utils.pipeline import start_output, write_json
from utils.preflight import MODEL_INDEX, PROGRAM, RUN_FILE, BaseModel

VERSIONED = ("torch", "colossalai", "diffusers", "transformers", "accelerate", "numpy", "Pillow", "safetensors")
TRAINED_ON = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class Plan(NamedTuple):
    """What follows from the arguments, the photos and the device."""

    num_steps: int
    num_ranks: int
    samples_per_step: int
    weight_dtype: torch.dtype
    learning_rates: list[float]


def plan_run(args: Namespace, *, num_photos: int, num_ranks: int, device: torch.device) -> Plan:
    """Steps, dtype and learning rates; fills in args.mixed_precision and args.max_train_steps where left out."""
    args.mixed_precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_ranks
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * math.ceil(num_photos / samples_per_step)
    learning_rates = learning_rate_table(
        args.learning_rate * (samples_per_step if args.scale_lr else 1),
        args.lr_scheduler,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    weight_dtype = WEIGHT_DTYPES[args.mixed_precision]
    return Plan(args.max_train_steps, num_ranks, samples_per_step, weight_dtype, learning_rates)


class RunRecord:
    """Writes run.json at the start ("running") and at the end ("complete"); the base's files are hashed meanwhile."""

    def __init__(
        self, args: Namespace, argv: list[str], plan: Plan, dataset, base: BaseModel, device, *, is_main: bool
    ):
        self.args, self.plan, self.dataset, self.device = args, plan, dataset, device
        self.started = time.perf_counter()
        if not is_main:
            return
        script = "train_dreambooth_colossalai.py"
        command = ["torchrun", "--nproc_per_node", str(plan.num_ranks), script, *argv]
        self.entries = dict(
            command=shlex.join(command),
            arguments=as_plain(args),
            seed=args.seed,
            num_ranks=plan.num_ranks,
            device=device_name(device),
            versions=versions(),
            photos=[dict(file=p.path.name, size=p.original_size, sha256=p.sha256) for p in dataset.photos],
            skipped_files=[dict(file=path.name, reason=reason) for path, reason in dataset.skipped],
            started_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        start_output(args.output_dir, self.entries)
        self._base_hashes = ThreadPoolExecutor(1).submit(hash_files, base)

    def summary(self) -> str:
        """The run in a few lines, for its beginning."""
        args, plan = self.args, self.plan
        skipped = [f"skipped {path.name!r}: {reason}" for path, reason in self.dataset.skipped]
        spread = (args.train_batch_size, args.gradient_accumulation_steps, plan.num_ranks)
        precision = "fp32" if args.mixed_precision == "no" else args.mixed_precision
        return "\n".join(
            [
                f"{len(self.dataset)} photos at {args.resolution} px, prompt {args.instance_prompt!r}",
                *skipped,
                f"{plan.num_steps} steps of {plan.samples_per_step} samples "
                "(batch {} x {} micro-batches x {} ranks)".format(*spread),
                f"lr {max(plan.learning_rates):g} ({args.lr_scheduler}), {precision} on {device_name(self.device)}",
            ]
        )

    def finish(self, log) -> str:
        """Marks the run complete in run.json; returns the closing line."""
        seconds = time.perf_counter() - self.started
        self.entries["base_model"] = self._base_hashes.result()
        self.entries["result"] = dict(
            num_steps=self.plan.num_steps,
            num_skipped=log.num_skipped,
            final_loss=log.smoothed_loss,
            seconds=round(seconds, 2),
            seconds_after_start=timing.marks,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        )
        write_json(self.args.output_dir / RUN_FILE, {"program": PROGRAM, "status": "complete", **self.entries})
        skipped = f", {log.num_skipped} skipped for overflow" if log.num_skipped else ""
        return (
            f"{self.plan.num_steps} steps in {seconds:.1f} s{skipped}; the pipeline is in {self.args.output_dir} "
            f"(DiffusionPipeline.from_pretrained loads it, evaluate.py samples it)"
        )


def hash_files(base: BaseModel) -> dict:
    """Folder and SHA-256 of every file of the base that training reads."""
    files = [base.folder / MODEL_INDEX]
    files += sorted(path for part in TRAINED_ON for path in (base.folder / part).glob("*") if path.is_file())
    return dict(folder=str(base.folder), sha256={str(p.relative_to(base.folder)): sha256_of(p) for p in files})


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
