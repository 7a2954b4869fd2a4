"""Out of memory, said in one line with the flags that would make the run smaller."""

import contextlib
import os
import re
import sys
from argparse import Namespace

from utils.errors import RunFailed
from utils.training.memory import GB, alternatives, memory_needed

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
        if os.environ.get("RANK", "0") != "0":  # the other ranks may have memory enough, and nothing to say
            print(f"error: rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)
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
