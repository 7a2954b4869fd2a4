"""Buffers in the host's memory that the GPU reads and writes by itself, over PCIe."""

import contextlib
import mmap
import weakref

import torch

from utils.kernels.operations import HAS_TRITON
from utils.runtime import private

if HAS_TRITON:
    from utils.kernels.adamw import add_one_

_PORTABLE_AND_MAPPED = 3  # cudaHostRegister's flags


def zeros(numel: int, dtype: torch.dtype, device: torch.device, on_host: bool) -> torch.Tensor:
    """Zeros [numel] on `device`, or in pinned host memory where `on_host` and the device is a GPU."""
    if on_host and device.type == "cuda":
        return pinned_zeros(numel, dtype, device)
    return torch.zeros(numel, dtype=dtype, device=device)


def pinned_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros [numel] in pinned memory of just that size: torch's own pinned memory comes in powers of two."""
    num_bytes = max(numel, 1) * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(pages, dtype=dtype, count=max(numel, 1))
    cudart = torch.cuda.cudart()
    with torch.cuda.device(device):
        failed = int(getattr(cudart, private.HOST_REGISTER)(buffer.data_ptr(), num_bytes, _PORTABLE_AND_MAPPED))
    if failed:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # the next operation would be blamed for the error
        return torch.zeros(numel, dtype=dtype, pin_memory=True)
    weakref.finalize(pages, getattr(cudart, private.HOST_UNREGISTER), buffer.data_ptr()).atexit = False
    return buffer[:numel]


def host_memory_problem(device: torch.device) -> str | None:
    """Why kernels on this GPU cannot read and write the host's memory, as a clause about Triton; None if they can."""
    if not HAS_TRITON:
        return "which is not here"
    return None if reaches_host_memory(device) else "which cannot reach the host's memory here"


def reaches_host_memory(device: torch.device) -> bool:
    """Whether kernels on this GPU can read and write the buffers of host_memory.pinned_zeros: tried, not assumed."""
    x = pinned_zeros(256, torch.float32, device)
    try:
        with torch.cuda.device(device):
            add_one_(x)
            torch.cuda.synchronize(device)
    except (RuntimeError, ValueError):
        return False
    return bool((x == 1).all())
