"""How near numbers must be, and what makes them differ.

What is promised: the same command on the same machine, with the same number of threads, gives the same bits; so does a
run that was interrupted and resumed. Tests of that compare bits, with == and torch.equal.

What is not: a sum in fp32 depends on the order of its terms, and libraries choose the order by the batch size, the
number of threads and ranks, the memory format, the processor's instructions and their own version. Tests across any of
these compare with the tolerances below. tests/processors.py runs the suite as other processors would.
"""

import os
from pathlib import Path

import torch

# Relative; seen over 20 steps on four stacks and three instruction sets: 6.7e-7 and 8.5e-6.
ANOTHER_ORDER = dict(loss=1e-5, grad_norm=1e-4)

# What makes a processor stand in for a lesser one, in torch, oneDNN and MKL.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


def _processor() -> dict[str, str]:
    """What /proc/cpuinfo says of the first one; nothing where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, value in (line.split(":", 1) for line in lines if ":" in line)}


def processor_flags() -> set[str]:
    """What this processor can."""
    return set(_processor().get("flags", "").split())


def what_decides_last_bits() -> dict[str, object]:
    """Of a sum on a CPU, in one process with one batch size."""
    fields = _processor()
    names = ("vendor_id", "cpu family", "model")
    return dict(
        torch=torch.__version__.partition("+")[0],
        capability=torch.backends.cpu.get_cpu_capability(),
        processor=" ".join(fields[name] for name in names if name in fields),
        num_threads=torch.get_num_threads(),
        limits={name: os.environ[name] for name in LIMITS if name in os.environ},
    )
