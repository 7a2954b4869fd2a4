"""Whether there is a GPU, without torch where there cannot be one: its import takes longer than all the checks."""

import ctypes
import shutil
from pathlib import Path

SIGNS = (Path("/dev/nvidia0"), Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))  # dxg: WSL; kfd: ROCm


def gpu_is_possible() -> bool:
    """Whether torch may see a GPU, or there is one that it should see: a device file, a driver's library or tool."""
    if any(path.exists() for path in SIGNS) or shutil.which("nvidia-smi"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
        return True
    except OSError:
        return False


def gpu_is_usable() -> bool:
    """torch.cuda.is_available()."""
    if not gpu_is_possible():
        return False
    import torch

    return torch.cuda.is_available()
