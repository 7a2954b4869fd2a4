"""What a run asks for: disk space, GPU memory, a GPU that torch can use; numbers that can hardly be meant."""

import math
import shutil
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import TryAgain, UserError
from utils.files.json_files import read_rows
from utils.files.ownership import METRICS_FILE, nearest_existing
from utils.models.folder import FROZEN_PARTS, BaseModel
from utils.run.plan import Plan
from utils.run.resume import Sources
from utils.runtime import environment
from utils.runtime.gpu import gpu_is_possible, no_gpu
from utils.training import memory
from utils.training.memory import GB, MemoryNeeds

POLYNOMIAL_END = 1e-7  # of diffusers' polynomial schedule, which must start above it
# Flags that change nothing, when that is so, and how it is said.
OF_CLASS_IMAGES = "prior_loss_weight num_class_images sample_batch_size prior_generation_precision"
OF_PICTURES = "validation_negative_prompt validation_inference_steps validation_guidance_scale num_validation_images"
WITHOUT_EFFECT: tuple[tuple[str, Callable[[Namespace], Any], str], ...] = (
    ("lr_warmup_steps", lambda a: a.lr_scheduler == "constant", "with --lr_scheduler constant (not ..._with_warmup)"),
    ("lr_num_cycles", lambda a: "restarts" not in a.lr_scheduler, "but with --lr_scheduler cosine_with_restarts"),
    ("lr_power", lambda a: a.lr_scheduler != "polynomial", "but with --lr_scheduler polynomial"),
    ("scale_lr", lambda a: a.samples_per_step == 1, "on steps of one sample"),
    ("num_train_epochs", lambda a: "max_train_steps" in a.changed, "beside --max_train_steps"),
    (OF_CLASS_IMAGES, lambda a: not a.with_prior_preservation, "without --with_prior_preservation"),
    (OF_PICTURES, lambda a: not a.validation_prompt, "without --validation_prompt"),
    ("validation_negative_prompt", lambda a: a.validation_guidance_scale <= 1, "without guidance (a scale above 1)"),
    ("validation_steps", lambda a: a.validation_steps > a.max_train_steps, "beyond the last step"),
    ("checkpoints_total_limit", lambda a: a.checkpointing_steps > a.max_train_steps, "in a run without a checkpoint"),
    ("logging_dir", lambda a: a.report_to == "none", "without --report_to tensorboard"),
    ("json", lambda a: not a.dry_run, "without --dry_run"),
    ("allow_changes", lambda a: not a.resume_from_checkpoint, "without --resume_from_checkpoint"),
)
# Between which values a number is taken without a word; beyond, a digit or a sign may be wrong (docs/flags.md).
USUAL = {
    "learning_rate": (1e-8, 1e-3),
    "adam_beta1": (0.5, 0.99),
    "adam_beta2": (0.9, 0.9999),
    "adam_weight_decay": (0, 0.1),
    "adam_epsilon": (1e-12, 1e-3),
    "max_grad_norm": (0, 100),
    "lr_num_cycles": (1, 100),
    "lr_power": (0.1, 10),
    "snr_gamma": (1, 20),
    "noise_offset": (0, 0.1),
    "prior_loss_weight": (0, 10),
    "num_class_images": (1, 5000),
    "validation_guidance_scale": (0, 30),
    "validation_inference_steps": (1, 250),
    "num_validation_images": (1, 64),
    "samples_per_step": (1, 256),
    "passes": (0, 5000),
}
MEANT = dict(samples_per_step="batch size x accumulation x ranks", passes="the times that a photo is shown")
MEASURED_STEPS = 50  # the last ones that a run has made say how long a step takes
FP16_REACH = 2**12  # a number that changes by less than this part of it is the same in fp16


class DiskNeeds(NamedTuple):
    """Bytes that a run writes, of them those that it copies, and what one of its checkpoints takes."""

    result: int
    copied: int
    checkpoint: int
    num_checkpoints: int

    @property
    def total(self) -> int:
        return self.result + self.num_checkpoints * self.checkpoint


def disk_needs(plan: Plan, base: BaseModel, first_step: int) -> DiskNeeds:
    """On the output folder's disk, from `first_step` on; UserError if a single file's own disk is too full."""
    count = base.num_parameters
    unet_bytes = count * (4 if plan.save_dtype == "fp32" else 2)
    place = nearest_existing(plan.output_dir)
    frozen = sum(path.stat().st_size for part in FROZEN_PARTS for path in base.files(part).values())
    result = unet_bytes + frozen
    if plan.export_single_file:
        result += _export_bytes(base, unet_bytes, nearest_existing(plan.export_single_file.parent), place)
    checkpoint = count * (12 if plan.save_dtype == "fp32" else 14)
    most = plan.num_steps // plan.checkpointing_steps - first_step // plan.checkpointing_steps
    if limit := plan.checkpoints["total_limit"]:
        most = min(most, limit + 1)
    return DiskNeeds(result, frozen, checkpoint, most)


def check_disk(plan: Plan, base: BaseModel, first_step: int) -> tuple[str, str]:
    """What the result and the checkpoints will take, against what is free; UserError if it is too little."""
    needs, usage = disk_needs(plan, base, first_step), shutil.disk_usage(nearest_existing(plan.output_dir))
    most, free = needs.num_checkpoints, usage.free
    said = f"{needs.result / GB:.2g} GB for the result, {needs.copied / GB:.2g} copied"
    said += f", {most} checkpoint{'' if most == 1 else 's'} of {needs.checkpoint / GB:.2g} GB" if most else ""
    if usage.total == 0:  # some mounted buckets and network folders do not know
        return f"{said}; the disk does not say how much is free", "note"
    said += f"; {free / GB:.3g} GB free"
    if needs.total > free:
        raise TryAgain(
            f"--output_dir {plan.output_dir}: too little disk space ({said}); free some, choose another disk, or keep "
            f"fewer checkpoints with --checkpoints_total_limit or --checkpointing_steps"
        )
    if needs.total + needs.checkpoint > free:
        return f"{said}: no room for the checkpoint that a signal would ask for", "note"
    return said, "ok"


def _export_bytes(base: BaseModel, unet_bytes: int, export_place: Path, place: Path) -> int:
    """What the single file takes on the output folder's disk; UserError if it has another one that is too full."""
    others = [path for part in ("vae", "text_encoder") for path in base.weights[part].files]
    needed = unet_bytes + sum(path.stat().st_size for path in others)
    if _same_device(export_place, place):
        return needed
    if (free := shutil.disk_usage(export_place).free) < needed:
        raise UserError(f"--export_single_file takes {needed / GB:.2g} GB, {export_place} has {free / GB:.3g} GB free")
    return 0


def _same_device(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def check_device(needs: MemoryNeeds, low_memory: bool) -> tuple[str, str]:
    """Where the run would train; UserError if it cannot. `low_memory`: --low_memory is why things are offloaded."""
    import torch

    if not torch.cuda.is_available():
        return no_gpu()
    num_ranks = environment.local_world_size() or 1
    if num_ranks > torch.cuda.device_count():
        raise UserError(f"--nproc_per_node {num_ranks}, but torch sees {torch.cuda.device_count()} GPUs here")
    device = torch.device("cuda", environment.local_rank())
    if needs.offload_optimizer != "none":
        from utils.training.packed import host_memory_problem

        if why := host_memory_problem(device):
            flag = "--low_memory" if low_memory else f"--offload_optimizer {needs.offload_optimizer}"
            instead = "--gradient_checkpointing and --use_8bit_adam save memory without it"
            raise UserError(f"{flag}: offloading on a GPU needs Triton 3.2 or newer, {why}; {instead}")
    free, _ = torch.cuda.mem_get_info(device)
    return _compare_memory(needs, low_memory, torch.cuda.get_device_name(), free)


def _compare_memory(needs: MemoryNeeds, low_memory: bool, gpu: str, free: float) -> tuple[str, str]:
    needed, on_host = memory.memory_needed(needs), memory.host_memory_needed(needs)
    said = f"{gpu}: about {needed / GB:.1f} GB of memory needed, {free / GB:.1f} GB free"
    if low_memory:
        said += f" (--low_memory: --gradient_checkpointing --offload_optimizer {needs.offload_optimizer})"
    if on_host:
        said += f"; {on_host / GB:.1f} GB of the host's memory, {memory.free_host_memory() / GB:.1f} GB free"
    if needed > free:
        fitting = [f"{flags} (about {less / GB:.1f} GB)" for flags, less in memory.alternatives(needs) if less <= free]
        advice = f"it fits with {', or with '.join(fitting)}" if fitting else "try a smaller --resolution"
        return f"{said}: it may not fit; {advice}", "note"
    on_host_free, copy = memory.free_host_memory(), memory.checkpoint_memory_needed(needs)
    if on_host > on_host_free:
        return f"{said}: it may not fit; --use_8bit_adam or another --offload_optimizer takes less", "note"
    if on_host + copy > on_host_free:
        left = max(0.0, on_host_free - on_host)
        said += f"; a checkpoint's copy takes {copy / GB:.1f} GB of the host's memory, {left / GB:.1f} GB free"
        return f"{said}: training will wait while parts of it are written without one", "note"
    return said, "ok"


def as_numbers(plan: Plan | None, sources: Sources | None) -> dict[str, Any]:
    """What a run takes and what is free, in bytes, for JSON; the seconds that its training is still going to take, by
    the steps that it has made before; its settings. None is not known. The GPU's memory is what it takes on a GPU.
    """
    if plan is None or sources is None:
        return dict.fromkeys(("gpu_memory", "host_memory", "disk", "training_seconds", "settings"))
    gpu_free, host_free = None, memory.free_host_memory()
    if gpu_is_possible():
        import torch

        gpu_free = torch.cuda.mem_get_info(environment.local_rank())[0] if torch.cuda.is_available() else None
    on_host = memory.host_memory_needed(plan.needs) + memory.checkpoint_memory_needed(plan.needs)
    rows = read_rows(plan.output_dir / METRICS_FILE)[-MEASURED_STEPS:] if sources.checkpoint else []
    seconds = [row["step_time"] * (plan.num_steps - sources.first_step) for row in rows if "step_time" in row]
    free = shutil.disk_usage(nearest_existing(plan.output_dir)).free
    return dict(
        gpu_memory=dict(needed=round(memory.memory_needed(plan.needs)), free=gpu_free),
        host_memory=dict(needed=round(on_host), free=round(host_free) if math.isfinite(host_free) else None),
        disk=dict(needed=disk_needs(plan, sources.base, sources.first_step).total, free=free),
        training_seconds=round(statistics.median(seconds), 1) if seconds else None,
        settings=dict(plan.arguments),
    )


def describe_flags(plan: Plan, num_photos: int) -> Iterator[str]:
    """A phrase for each flag that has no effect, and for each number that can hardly be meant."""
    rate, passes = plan.learning_rates["lr"], plan.num_steps * plan.samples_per_step / num_photos
    found = dict(plan.arguments, changed=plan.changed, samples_per_step=plan.samples_per_step, passes=passes)
    for flags, is_so, when in WITHOUT_EFFECT:
        given = [f"--{name}" for name in flags.split() if name in plan.changed and plan.arguments[name]]
        if given and is_so(Namespace(**found)):
            yield f"{', '.join(given)}: no effect {when}"
    for name, (least, most) in USUAL.items():
        value = rate if name == "learning_rate" else found[name]
        if value is not None and not least <= value <= most:
            yield f"{MEANT.get(name, f'--{name}')}: {value:g} is not in {least:g} to {most:g}; is it meant?"


def check_schedule(plan: Plan) -> str | None:
    """A phrase if the warm-up is not over before the run is; UserError for a schedule that diffusers refuses."""
    lr, name = plan.learning_rates["lr"], plan.learning_rates["lr_scheduler"]
    warmup, steps = plan.learning_rates["num_warmup_steps"], plan.num_steps
    if name == "polynomial" and lr <= POLYNOMIAL_END:
        raise UserError(f"--lr_scheduler polynomial ends at {POLYNOMIAL_END:g}: --learning_rate {lr:g} is not above")
    if name == "constant" or warmup < steps:
        return None
    reached = lr * (steps - 1) / warmup
    return (
        f"the warm-up (--lr_warmup_steps {warmup}) is as long as the run ({steps} steps) or longer: the learning rate "
        f"reaches {reached:.2g} of {lr:.2g}; a tenth of the steps is usual: --lr_warmup_steps {steps // 10}"
    )


def describe_rounding(plan: Plan) -> str | None:
    """A phrase if the saved file keeps some changes only: AdamW moves a weight by the learning rate a step at most."""
    reach = plan.learning_rates["lr"] * plan.num_steps
    if plan.save_dtype != "fp16" or reach * FP16_REACH >= 1:  # there are hardly any weights above 1
        return None
    return (
        f"{plan.num_steps} steps move a weight by {reach:.1g} at most: saved in fp16, those above "
        f"{reach * FP16_REACH:.1g} stay what they were; --save_dtype fp32 keeps every change"
    )
