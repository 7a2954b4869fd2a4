"""What this machine has, what of it is amiss, and the command that mends it: python -m utils.doctor"""

import argparse
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from utils.runtime.stand_ins import IMPORTED_NAMES, why_not

# The oldest and the newest version of tests/matrix.sh's legs (docs/compatibility.md).
TESTED = {
    "torch": ("2.2.2", "2.15.0"),
    "transformers": ("4.39.3", "5.24.0"),
    "diffusers": ("0.27.2", "0.42.1"),
    "accelerate": ("0.28.0", "1.15.0"),
    "colossalai": ("0.5.0", "0.5.0"),
    "numpy": ("1.26.4", "2.4.6"),
    "safetensors": ("0.4.3", "0.8.0"),
    "Pillow": ("10.3.0", "13.0.0"),
}
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


def python_finding(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Python 3.10 or newer."""
    name = f"Python {'.'.join(map(str, version))}, {platform.machine()}"
    if version < (3, 10):
        return Finding("problem", f"{name}: 3.10 or newer is needed", "PYTHON=python3.11 bash setup.sh")
    return Finding("ok", name)


def package_findings(installed: dict[str, str | None]) -> list[Finding]:
    """A finding for each of TESTED; `installed` holds their versions, None where there is none."""
    found = []
    for name, (oldest, newest) in TESTED.items():
        version = installed.get(name)
        if version is None:
            found.append(Finding("problem", f"{name} is not installed", REINSTALL))
        elif name == "colossalai" and version != oldest:
            mend = "python -m pip install --no-deps colossalai==0.5.0"
            found.append(Finding("problem", f"colossalai {version}: this program is made for {oldest}", mend))
        elif not _numbers(oldest) <= _numbers(version) <= _numbers(newest):
            found.append(Finding("note", f"{name} {version}: not tested; {oldest} to {newest} are", REINSTALL))
        else:
            found.append(Finding("ok", f"{name} {version}"))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 5, 1) of 2.5.1+cu124."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def optional_findings() -> list[Finding]:
    """The packages that only ColossalAI imports: training goes on without them."""
    found = []
    for package in IMPORTED_NAMES:
        reason = why_not(package)
        mend = f"python -m pip install --force-reinstall --no-deps {package}"
        what = f"{package} cannot be imported ({reason}); training goes on without it"
        found.append(Finding("note", what, mend) if reason else Finding("ok", f"{package} (optional)"))
    return found


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


def examine() -> list[Finding]:
    """Everything about this machine and its packages."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    found = [python_finding(), *package_findings({name: version(name) for name in TESTED})]
    if version("torch"):
        reason = why_not("torch")
        found += [Finding("problem", f"torch cannot be imported ({reason})", REINSTALL)] if reason else examine_gpu()
        found += optional_findings()
    if not any(finding.level == "problem" for finding in found):
        reason = why_not("utils.runtime.colossal")
        found += [Finding("problem", f"colossalai cannot be imported ({reason})", REINSTALL)] if reason else []
    return [*found, Finding("ok", "no compiler, nvcc or Apex is needed: nothing is built on installation")]


def problems_of_gpu() -> list[str]:
    """What a run is told at its start: one line for each thing amiss with the GPU."""
    return [f"warning: {f.what}: {f.mend}" for f in examine_gpu() if f.level == "problem"]


def main(argv: list[str] | None = None) -> int:
    """Prints every finding; 1 where there is a problem."""
    argparse.ArgumentParser(prog="python -m utils.doctor", description=__doc__).parse_args(argv)
    found = examine()
    print("\n".join(map(str, found)))
    num_problems = sum(finding.level == "problem" for finding in found)
    print(f"{num_problems} problem{'' if num_problems == 1 else 's'}")
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
