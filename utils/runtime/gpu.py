"""Is there a GPU, can torch use it, and if not, why: for the doctor, the preflight table and the start of a run.

torch is imported only if there may be one: its import takes longer than all the checks. And what the first operation
of its kind loads or looks up on a GPU, by threads while Python imports the libraries.
"""

import contextlib
import ctypes
import importlib
import os
import re
import shutil
import sys
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.runtime import private
from utils.runtime.environment import local_rank
from utils.runtime.process import nothing_collected

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
    with nothing_collected():
        import torch  # not before: without a GPU nothing needs it this early

    return torch.cuda.is_available()


def gpu_without_bf16() -> str | None:
    """The name of a GPU here without bf16 arithmetic (before Ampere), which torch emulates slowly; else None."""
    if not gpu_is_usable():
        return None
    import torch

    before_ampere = (i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < (8, 0))
    return next((torch.cuda.get_device_name(i) for i in before_ampere), None)


OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # by CUDA's major version, on Linux
DRIVER_FILE = Path("/proc/driver/nvidia/version")
DRIVER_VERSION = re.compile(r"Kernel Module\b.*?\s(\d+\.[\d.]+)")  # a word like x86_64 may come before it
REINSTALL = "bash setup.sh"
UPSTREAM = "python -m pip install -r requirements-upstream.txt (torch 2.5.1 for CUDA 12.4)"


class Finding(NamedTuple):
    """One line: `level` is ok, note or problem; `command` solves a problem."""

    level: str
    what: str
    command: str = ""

    def __str__(self) -> str:
        return f"{self.level:8}{self.what}" + (f"\n        -> {self.command}" if self.command else "")


def gpu_findings(
    *,
    cuda: str | None,
    driver: str | None,
    capabilities: dict[str, tuple[int, int]],
    architectures: list[str],
    is_present: bool = False,
    is_hidden: bool = False,
) -> list[Finding]:
    """Whether torch can use the GPUs there are: one finding for each, or one that says why there is none.

    Args:
        cuda: version of the CUDA that torch was built for; None for a CPU build.
        driver: version of the NVIDIA driver; None if it is not known.
        capabilities: (major, minor) of each GPU that torch sees, by its name.
        architectures: what torch has kernels for: sm_80, compute_90 and so on.
        is_present: there is a GPU, or its tools, whether or not the driver says its version.
        is_hidden: CUDA_VISIBLE_DEVICES names no GPU.
    """
    if not capabilities and driver is None and not is_present:
        return [Finding("note", "no NVIDIA driver: training runs on the CPU, in fp32, which takes far longer")]
    if not capabilities and is_hidden:
        return [Finding("note", "CUDA_VISIBLE_DEVICES hides the GPU: training runs on the CPU, in fp32")]
    if cuda is None:
        there = f"driver {driver}" if driver else "GPU"
        return [Finding("problem", f"there is an NVIDIA {there}, but this torch is built for the CPU alone", UPSTREAM)]
    needed = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if driver and int(driver.split(".")[0]) < needed:
        what = f"NVIDIA driver {driver} is too old for torch's CUDA {cuda}, which needs {needed} or newer"
        return [Finding("problem", what, f"update the driver, or: {UPSTREAM}")]
    if not capabilities and driver is None:
        what = f"there is an NVIDIA GPU, but its driver is not loaded, or too old for torch's CUDA {cuda}"
        return [Finding("problem", what, f"load or update the driver, or: {UPSTREAM}")]
    if not capabilities:
        what = f"driver {driver} and CUDA {cuda} fit, but torch sees no GPU"
        return [Finding("problem", what, "unset CUDA_VISIBLE_DEVICES; in a container: start it with --gpus all")]
    return [_usable_gpu(name, of, cuda, driver, architectures) for name, of in capabilities.items()]


def _usable_gpu(name: str, of: tuple[int, int], cuda: str, driver: str | None, architectures: list[str]) -> Finding:
    what = f"{name} (sm_{of[0]}{of[1]}), torch's CUDA {cuda}, driver {driver or 'unknown'}"
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)[a-z]?", " ".join(architectures)):
        built = (int(major), int(minor))  # sm_ runs on its own major version, compute_ on any later one
        if built <= of and (kind == "compute" or built[0] == of[0]):
            return Finding("ok", what)
    advice = f"{REINSTALL} for a newer GPU; for an older one: {UPSTREAM}"
    return Finding("problem", f"{what}: this torch has no kernels for it, only {' '.join(architectures)}", advice)


def missing_for_triton() -> str | None:
    """What Triton lacks to build a kernel's launcher, which is C, as triton/runtime/build.py looks for it; or None."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"no C compiler ({' or '.join(compilers)})"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    return None if Path(include, "Python.h").exists() else f"no {include}/Python.h"


def compiler_findings() -> list[Finding]:
    """That Triton cannot build its kernels, if so; everything runs without them, in more time and memory."""
    if (lack := missing_for_triton()) is None:
        return []
    what = f"there is {lack}, so Triton cannot build this program's kernels: a step takes up to 15 times as long"
    return [Finding("problem", what, "apt-get install gcc libc6-dev python3-dev")]


def examine_gpu() -> list[Finding]:
    """gpu_findings of this machine; if torch can use a GPU, compiler_findings too."""
    import torch

    found = DRIVER_VERSION.search(DRIVER_FILE.read_text()) if DRIVER_FILE.exists() else None
    available = torch.cuda.is_available()
    devices = range(torch.cuda.device_count() if available else 0)
    found_gpu = gpu_findings(
        cuda=torch.version.cuda,
        driver=found[1] if found else None,
        capabilities={torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in devices},
        architectures=torch.cuda.get_arch_list() if available else [],
        is_present=Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None,
        is_hidden=_is_hidden(),
    )
    return found_gpu + (compiler_findings() if available else [])


def _is_hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def say_problems_of_gpu() -> None:
    """What a run says when it starts: a line on stderr for each thing that is wrong with the GPU."""
    for finding in examine_gpu():
        if finding.level == "problem":
            print(f"warning: {finding.what}: {finding.command}", file=sys.stderr, flush=True)


def no_gpu() -> tuple[str, str]:
    """What the preflight table says if torch sees no GPU: why, and a verdict."""
    finding = examine_gpu()[0]
    if finding.level == "problem":
        return f"training on the CPU, which takes hours: {finding.what}; {finding.command}", "note"
    return f"no GPU{' (CUDA_VISIBLE_DEVICES hides it)' if _is_hidden() else ''}: training on the CPU", "ok"


def pick_device() -> "torch.device":
    """The GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def warm_up_gpu() -> None:
    """Begins to make this rank's GPU ready: its context, cuDNN, attention's kernels, Triton; nothing without a GPU.

    Nothing that a run depends on is touched: no random number is drawn, and cuBLAS, which reads its settings once, is
    left to whoever has made them (runtime/determinism.py).
    """
    if gpu_is_possible():
        for work in (_convolve_and_attend, _read_triton):
            threading.Thread(target=work, name="warm-up", daemon=True).start()


def _read_triton() -> None:
    """Triton knows its cached kernels by a hash of all its own files too, 0.4 s of reading, which it keeps."""
    with contextlib.suppress(Exception):  # no Triton, or another: then it reads when the first kernel is launched
        getattr(importlib.import_module(private.TRITON_CACHE), private.TRITON_KEY)()


def _convolve_and_attend() -> None:
    import torch

    try:
        if not torch.cuda.is_available():
            return
        with torch.cuda.device(local_rank()), torch.enable_grad():
            image = torch.zeros(1, 64, 16, 16, dtype=torch.float16, device="cuda", requires_grad=True)
            weight = torch.zeros(64, 64, 3, 3, dtype=torch.float16, device="cuda", requires_grad=True)
            torch.nn.functional.conv2d(image, weight, padding=1).sum().backward()
            tokens = torch.zeros(1, 8, 256, 40, dtype=torch.float16, device="cuda", requires_grad=True)
            torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).sum().backward()
            torch.cuda.synchronize()
    except RuntimeError:  # whatever is wrong with this GPU is said where it is used
        pass
