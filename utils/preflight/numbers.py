"""Numbers that can be obeyed and can hardly be meant: each a note in the preflight table."""

import os
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files.safetensors_files import safetensors_header
from utils.models.folder import BaseModel
from utils.run.plan import Plan

DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
SAMPLED_TENSORS, SAMPLED_WEIGHTS = 64, 512  # of a file's largest tensors, so many of each
FEW = 0.5  # a smaller share of weights that can move is worth a note
POLYNOMIAL_END = 1e-7  # of diffusers' polynomial schedule, which must start above it
ACCELERATE = "ACCELERATE_MIXED_PRECISION"


def check_schedule(plan: Plan) -> str | None:
    """A phrase if the warm-up is not over before the run is; UserError for a schedule that diffusers refuses."""
    lr, name = plan.learning_rates["lr"], plan.learning_rates["lr_scheduler"]
    warmup, steps = plan.learning_rates["num_warmup_steps"], plan.num_steps
    if name == "polynomial" and lr <= POLYNOMIAL_END:
        raise UserError(
            f"--lr_scheduler polynomial ends at {POLYNOMIAL_END:g}: --learning_rate {lr:g} is not above it"
        )
    if name == "constant" or warmup < steps:
        return None
    reached = lr * (steps - 1) / warmup
    return (
        f"the warm-up (--lr_warmup_steps {warmup}) is as long as the run ({steps} steps) or longer: the learning rate "
        f"reaches {reached:.2g} of {lr:.2g}; a tenth of the steps is usual: --lr_warmup_steps {steps // 10}"
    )


def describe_rounding(plan: Plan, base: BaseModel) -> str | None:
    """A phrase if few weights can move in the saved file at all, by this learning rate and number of steps.

    AdamW moves a weight by about the learning rate a step at most; what stays below half the spacing of the file's
    numbers is rounded away. Estimated from a sample of the base's weights.
    """
    reach = farthest(plan)
    share = share_that_moves(base, reach) if plan.save_dtype == "fp16" else 1.0
    if share >= FEW:
        return None
    return (
        f"saved in fp16, at most {100 * share:.0f}% of the weights can change: {plan.num_steps} steps move one by "
        f"{reach:.1g} at most, which fp16 rounds away from the others; --save_dtype fp32 keeps every change"
    )


def farthest(plan: Plan) -> float:
    """How far the run can move a weight: the learning rates of all steps, as if none decayed after the warm-up."""
    lr, steps = plan.learning_rates["lr"], plan.num_steps
    warmup = 0 if plan.learning_rates["lr_scheduler"] == "constant" else plan.learning_rates["num_warmup_steps"]
    warming = min(warmup, steps)
    return lr * (warming * (warming - 1) / 2 / max(1, warmup) + steps - warming)


def share_that_moves(base: BaseModel, reach: float) -> float:
    """Of the UNet's weights, those whose fp16 number changes if they move by `reach`; 1 if that cannot be seen."""
    moving = total = 0.0
    for path in base.unet_weights:
        if path.suffix != ".safetensors":
            return 1.0
        for count, values in _samples(path):
            exact, stored = values.astype(np.float64), values.astype(np.float16)
            moves = [(exact + sign * reach).astype(np.float16) != stored for sign in (1, -1)]
            moving += count * np.mean(moves[0] | moves[1])
            total += count
    return moving / total if total else 1.0


def _samples(path: Path) -> list[tuple[int, np.ndarray]]:
    """(number of weights, some of them) for the largest tensors of a safetensors file; not of dtypes numpy lacks."""
    entries = [entry for entry in safetensors_header(path).values() if entry["dtype"] in DTYPES]
    entries.sort(key=lambda entry: entry["data_offsets"][0] - entry["data_offsets"][1])
    samples = []
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for entry in entries[:SAMPLED_TENSORS]:
            dtype = np.dtype(DTYPES[entry["dtype"]])
            first, end = entry["data_offsets"]
            file.seek(start + first)
            values = np.frombuffer(file.read(min(end - first, SAMPLED_WEIGHTS * dtype.itemsize)), dtype)
            samples.append(((end - first) // dtype.itemsize, values))
    return samples


def describe_launcher(plan: Plan) -> str | None:
    """A phrase if accelerate was told another precision than the run has: nothing of accelerate's is read."""
    theirs = os.environ.get(ACCELERATE, plan.mixed_precision)
    if theirs == plan.mixed_precision:
        return None
    return (
        f"accelerate's mixed precision ({theirs}) is not read: the run is in {plan.mixed_precision}; "
        f"--mixed_precision says another"
    )
