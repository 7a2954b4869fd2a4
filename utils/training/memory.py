"""How much memory a run takes, by part, and which flags would make it less. Arithmetic: no torch here."""

import contextlib
import math
import re
import sys
from argparse import Namespace
from pathlib import Path

from utils.errors import RunFailed
from utils.runtime import environment

GB = 1e9
# Activations of Stable Diffusion v1's UNet in bytes a 512-pixel image in fp16, without and with checkpointing, and
# what is there whatever the flags: prompts, latents, the VAE, workspaces. Calibrated by bench/memory.py.
ACTIVATIONS = 0.77e9
ACTIVATIONS_CHECKPOINTED = 0.25e9
REST = 0.3e9
EIGHT_BIT = 1 + 4 / 256  # bytes of a moment in 8 bits, with its share of the scale
# What saves memory, that first which costs the least time; the last is --low_memory.
SAVERS = (
    dict(gradient_checkpointing=True),
    dict(use_8bit_adam=True),
    dict(offload_optimizer="moments"),
    dict(offload_optimizer="all"),
    dict(gradient_checkpointing=True, offload_optimizer="all"),
)


def memory_parts(args: Namespace, count: int) -> dict[str, float]:
    """Bytes of GPU memory at the peak, by what they are for; their sum is the estimate.

    Args:
        args: the training script's; the number of ranks is the environment's WORLD_SIZE.
        count: the UNet's parameters.

    On one rank gradients are made while activations are freed, so the larger of the two counts. The buckets in which
    several ranks reduce them are there all the time, and so is the buffer that 8-bit moments need, beside those.
    """
    fp32 = args.mixed_precision == "no"
    several_ranks = environment.num_ranks() > 1
    moment = EIGHT_BIT if args.use_8bit_adam else 4
    images = args.train_batch_size * (2 if args.with_prior_preservation else 1)
    activations = ACTIVATIONS_CHECKPOINTED if args.gradient_checkpointing else ACTIVATIONS
    activations *= images * (args.resolution / 512) ** 2 * (2 if fp32 else 1)
    gradients = count * (4 if fp32 else 2)
    if several_ranks:
        gradients *= 2 if args.use_8bit_adam else 1
    elif not args.use_8bit_adam:
        activations = max(0, activations - gradients)
    return {
        "weights": count * (4 if fp32 else 2),
        "fp32 masters": 0 if fp32 or args.offload_optimizer == "all" else 4 * count,
        "moments": 2 * moment * count if args.offload_optimizer == "none" else 0,
        "gradients": gradients,
        "activations": activations,
        "the rest": REST,
    }


def memory_needed(args: Namespace, count: int) -> float:
    """Bytes of GPU memory at the peak."""
    return sum(memory_parts(args, count).values())


def host_memory_needed(args: Namespace, count: int) -> float:
    """Bytes of host memory for what is offloaded."""
    if args.offload_optimizer == "none":
        return 0
    masters = 4 * count if args.offload_optimizer == "all" and args.mixed_precision != "no" else 0
    return masters + 2 * (EIGHT_BIT if args.use_8bit_adam else 4) * count


def free_host_memory() -> float:
    """Bytes that programs may still take, by /proc/meminfo; infinite where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def alternatives(args: Namespace, count: int) -> list[tuple[str, float]]:
    """(flags, bytes with them) of each way to take less memory than `args`, those first that cost the least time."""
    found, now = [], memory_needed(args, count)
    for changes in SAVERS:
        flags = [_flag(name, value) for name, value in changes.items() if getattr(args, name) != value]
        if changes == SAVERS[-1]:
            flags = ["--low_memory"] if len(flags) == 2 else []
        needed = memory_needed(Namespace(**vars(args) | changes), count)
        if flags and needed < 0.99 * now:
            found.append((" ".join(flags), needed))
    if args.train_batch_size > 1:
        smaller = args.train_batch_size // 2
        needed = memory_needed(Namespace(**vars(args) | dict(train_batch_size=smaller)), count)
        found.append((f"--train_batch_size {smaller}", needed))
    return found


def _flag(name: str, value) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


SIGN = re.compile(r"out of memory|_ALLOC_FAILED|can't allocate memory", re.I)  # of torch, CUDA, cuBLAS, the host


@contextlib.contextmanager
def out_of_memory_in_one_line(args: Namespace, count: int):
    """Within it, whatever runs out of memory raises RunFailed: one line, exit code 1.

    Args:
        count: the UNet's parameters.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        line = out_of_memory_line(args, count, on_host=isinstance(error, MemoryError) or "CPUAllocator" in str(error))
        if not environment.is_main():  # the other ranks may have memory enough, and nothing to say
            print(f"error: rank {environment.rank()}: {line}", file=sys.stderr, flush=True)
        raise RunFailed(line) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that the GPU's or the host's memory is full."""
    told = isinstance(error, RuntimeError) and not isinstance(error, RunFailed) and SIGN.search(str(error))
    return isinstance(error, MemoryError) or bool(told)


def out_of_memory_line(args: Namespace, count: int, on_host: bool = False) -> str:
    """What was too much, and how much each flag that is not on would save of it."""
    if on_host:
        return "the host's memory is full; close other programs, or leave --offload_optimizer and --low_memory out"
    needed = memory_needed(args, count)
    savings = [f"{flags} {(needed - less) / GB:.1f} GB" for flags, less in alternatives(args, count)]
    saved = f"What saves about how much: {', '.join(savings)}; " if savings else ""
    return (
        f"the GPU's memory is full: this run needs about {needed / GB:.1f} GB of it. {saved}a smaller --resolution "
        f"helps too, and a smaller --train_batch_size with more --gradient_accumulation_steps"
    )
