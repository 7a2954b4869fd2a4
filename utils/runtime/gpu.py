"""Whether there is a GPU, without torch where there cannot be one: its import takes longer than all the checks."""

import ctypes
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

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


OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # by CUDA's major version, on Linux


DRIVER_FILE = Path("/proc/driver/nvidia/version")


DRIVER_VERSION = re.compile(r"Kernel Module\b.*?\s(\d+\.[\d.]+)")  # a word like x86_64 may come before it


REINSTALL = "bash setup.sh"


UPSTREAM = "python -m pip install -r requirements-upstream.txt (torch 2.5.1 for CUDA 12.4)"


class Finding(NamedTuple):
    """One line: `level` is ok, note or problem; `mend` is the command for a problem."""

    level: str
    what: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.level:8}{self.what}" + (f"\n        -> {self.mend}" if self.mend else "")


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 5, 1) of 2.5.1+cu124."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def gpu_findings(
    *,
    cuda: str | None,
    driver: str | None,
    capabilities: dict[str, tuple[int, int]],
    architectures: list[str],
) -> list[Finding]:
    """Whether torch can use the GPUs there are.

    Args:
        cuda: version of the CUDA that torch was built for; None for a CPU build.
        driver: version of the NVIDIA driver; None where there is none.
        capabilities: (major, minor) of each GPU that torch sees, by its name.
        architectures: what torch has kernels for: sm_80, compute_90 and so on.
    """
    if driver is None and not capabilities:
        return [Finding("note", "no NVIDIA driver: training runs on the CPU, in fp32, which takes far longer")]
    if cuda is None:
        what = f"there is an NVIDIA driver {driver}, but this torch is built for the CPU alone"
        return [Finding("problem", what, UPSTREAM)]
    needed = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if driver and _numbers(driver)[0] < needed:
        what = f"NVIDIA driver {driver} is too old for torch's CUDA {cuda}, which needs {needed} or newer"
        return [Finding("problem", what, f"update the driver, or: {UPSTREAM}")]
    if not capabilities:
        what = f"driver {driver} and CUDA {cuda} fit, but torch sees no GPU"
        return [Finding("problem", what, "unset CUDA_VISIBLE_DEVICES; in a container: start it with --gpus all")]
    found = []
    for name, capability in capabilities.items():
        what = f"{name} (sm_{capability[0]}{capability[1]}), torch's CUDA {cuda}, driver {driver or 'unknown'}"
        if has_kernels(capability, architectures):
            found.append(Finding("ok", what))
        else:
            known = " ".join(architectures)
            mend = f"{REINSTALL} for a newer GPU; for an older one: {UPSTREAM}"
            found.append(Finding("problem", f"{what}: this torch has no kernels for it, only {known}", mend))
    return found


def has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for one of `architectures` runs: sm_ on its own major version, compute_ on any later one."""
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)[a-z]?", " ".join(architectures)):
        built = (int(major), int(minor))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def examine_gpu() -> list[Finding]:
    """gpu_findings of this machine."""
    import torch

    found = DRIVER_VERSION.search(DRIVER_FILE.read_text()) if DRIVER_FILE.exists() else None
    available = torch.cuda.is_available()
    devices = range(torch.cuda.device_count() if available else 0)
    return gpu_findings(
        cuda=torch.version.cuda,
        driver=found[1] if found else None,
        capabilities={torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in devices},
        architectures=torch.cuda.get_arch_list() if available else [],
    )


def problems_of_gpu() -> list[str]:
    """What a run is told at its start: one line for each thing amiss with the GPU."""
    return [f"warning: {f.what}: {f.mend}" for f in examine_gpu() if f.level == "problem"]


def pick_device() -> "torch.device":
    """The GPU where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def no_gpu(torch) -> tuple[str, str]:
    """What the preflight table says if torch sees no GPU: why, and a verdict."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    present = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if not present or hidden:
        return f"no GPU{' (CUDA_VISIBLE_DEVICES hides it)' if hidden else ''}: training on the CPU", "ok"
    built = torch.version.cuda
    reason = f"the driver is too old for its CUDA {built}, or not loaded" if built else "it was built without CUDA"
    return f"AN NVIDIA GPU IS HERE, BUT TORCH CANNOT USE IT ({reason}): training on the CPU, which takes hours", "note"
