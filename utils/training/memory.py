"""How much memory a run takes, by part, and which flags would make it less. Arithmetic: no torch here."""

import contextlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import RunFailed
from utils.runtime import environment

GB = 1e9
# Activations of Stable Diffusion v1's UNet in bytes a 512-pixel image in fp16, without and with checkpointing, and
# what is there whatever the flags: prompts, latents, the VAE, workspaces. Calibrated by bench/memory.py.
ACTIVATIONS = 0.77e9
ACTIVATIONS_CHECKPOINTED = 0.25e9
REST = 0.3e9
EIGHT_BIT = 1 + 4 / 256  # bytes of a moment in 8 bits, with its share of the scale
MEMINFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# What saves memory, that first which costs the least time; the last is --low_memory.
SAVERS: tuple[dict[str, Any], ...] = (
    dict(gradient_checkpointing=True),
    dict(use_8bit_adam=True),
    dict(offload_optimizer="moments"),
    dict(offload_optimizer="all"),
    dict(gradient_checkpointing=True, offload_optimizer="all"),
)


class MemoryNeeds(NamedTuple):
    """What decides how much memory a run takes: the UNet's parameters, and the flags of those names."""

    num_parameters: int
    num_ranks: int
    fp32: bool  # --mixed_precision no
    train_batch_size: int
    with_prior_preservation: bool
    resolution: int
    gradient_checkpointing: bool
    use_8bit_adam: bool
    offload_optimizer: str


def memory_parts(needs: MemoryNeeds) -> dict[str, float]:
    """Bytes of GPU memory at the peak, by what they are for; their sum is the estimate.

    On one rank gradients take the place of the activations that the backward pass frees: the larger of the two counts.
    The buckets in which several ranks reduce gradients are there all the time.
    """
    count, moment = needs.num_parameters, EIGHT_BIT if needs.use_8bit_adam else 4
    images = needs.train_batch_size * (2 if needs.with_prior_preservation else 1)
    activations = ACTIVATIONS_CHECKPOINTED if needs.gradient_checkpointing else ACTIVATIONS
    activations *= images * (needs.resolution / 512) ** 2 * (2 if needs.fp32 else 1)
    gradients = count * (4 if needs.fp32 else 2)
    if needs.num_ranks == 1:
        activations = max(0, activations - gradients)
    return {
        "weights": count * (4 if needs.fp32 else 2),
        "masters": 0 if needs.fp32 or needs.offload_optimizer == "all" else 2 * count,  # beside the weights
        "moments": 2 * moment * count if needs.offload_optimizer == "none" else 0,
        "gradients": gradients,
        "activations": activations,
        "the rest": REST,
    }


def memory_needed(needs: MemoryNeeds) -> float:
    """Bytes of GPU memory at the peak."""
    return sum(memory_parts(needs).values())


def host_memory_needed(needs: MemoryNeeds) -> float:
    """Bytes of host memory for what is offloaded."""
    if needs.offload_optimizer == "none":
        return 0
    masters = 2 if needs.offload_optimizer == "all" and not needs.fp32 else 0
    return (masters + 2 * (EIGHT_BIT if needs.use_8bit_adam else 4)) * needs.num_parameters


def checkpoint_memory_needed(needs: MemoryNeeds) -> float:
    """Bytes of host memory for the copy of the state that is written as a checkpoint while a GPU trains on.

    Moments that are offloaded lie in the host's memory already; those in 8 bits are written in fp32, as masters are.
    """
    moments = 8 if needs.offload_optimizer == "none" or needs.use_8bit_adam else 0
    return (4 + moments) * needs.num_parameters


def free_host_memory() -> float:
    """Bytes that this process may still take, by /proc/meminfo and its control groups; infinite without them."""
    return min(_available(), *map(_left_in_group, _groups()))


def _available() -> float:
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def _groups() -> list[Path]:
    """Folders of this process's control group (of version 2) and of those above it."""
    try:
        names = re.findall(r"^0::/(.*)$", OWN_GROUPS.read_text(encoding="utf-8"), re.M)
    except OSError:
        names = []
    own = Path(*names)
    return [GROUPS / each for each in (own, *own.parents)]


def _left_in_group(folder: Path) -> float:
    """Bytes below the limit of a control group, with what the kernel would take back from the page cache."""
    try:
        limit, used, statistics = ((folder / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = dict(line.split() for line in statistics.splitlines()).get("inactive_file", 0)
        return max(0, int(limit) - int(used) + int(cached))
    except (OSError, ValueError):  # there is none, or its limit is "max"
        return math.inf


def alternatives(needs: MemoryNeeds) -> list[tuple[str, float]]:
    """(flags, bytes with them) of each way to take less memory, those first that cost the least time."""
    found, now = [], memory_needed(needs)
    for changes in SAVERS:
        changed = {name: value for name, value in changes.items() if getattr(needs, name) != value}
        flags = [f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items()]
        if changes == SAVERS[-1]:
            flags = ["--low_memory"] if len(flags) == 2 else []
        needed = memory_needed(needs._replace(**changes))
        if flags and needed < 0.99 * now:
            found.append((" ".join(flags), needed))
    if needs.train_batch_size > 1:
        smaller = needs.train_batch_size // 2
        found.append((f"--train_batch_size {smaller}", memory_needed(needs._replace(train_batch_size=smaller))))
    return found


SIGN = re.compile(r"out of memory|_ALLOC_FAILED|can't allocate memory", re.I)  # of torch, CUDA, cuBLAS, the host


@contextlib.contextmanager
def out_of_memory_in_one_line(needs: MemoryNeeds) -> Iterator[None]:
    """Within it, whatever runs out of memory raises RunFailed: one line, exit code 1."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        line = out_of_memory_line(needs, on_host=isinstance(error, MemoryError) or "CPUAllocator" in str(error))
        if not environment.is_main():  # the other ranks may have memory enough, and nothing to say
            print(f"error: rank {environment.rank()}: {line}", file=sys.stderr, flush=True)
        raise RunFailed(line) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that the GPU's or the host's memory is full."""
    told = isinstance(error, RuntimeError) and not isinstance(error, RunFailed) and SIGN.search(str(error))
    return isinstance(error, MemoryError) or bool(told)


def out_of_memory_line(needs: MemoryNeeds, on_host: bool = False) -> str:
    """What was too much, and how much each flag that is not on would save of it."""
    if on_host:
        return "the host's memory is full; close other programs, or leave --offload_optimizer and --low_memory out"
    needed = memory_needed(needs)
    savings = [f"{flags} {(needed - less) / GB:.1f} GB" for flags, less in alternatives(needs)]
    saved = f"What saves about how much: {', '.join(savings)}; " if savings else ""
    return (
        f"the GPU's memory is full: this run needs about {needed / GB:.1f} GB of it. {saved}a smaller --resolution "
        f"helps too, and a smaller --train_batch_size with more --gradient_accumulation_steps"
    )
