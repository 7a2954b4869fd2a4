"""What this machine has, what is wrong with it, and the command that fixes it: python -m utils.doctor"""

import argparse
import contextlib
import importlib
import platform
import sys
from importlib import metadata

from utils.command_line import run_main
from utils.errors import first_line
from utils.runtime.gpu import REINSTALL, Finding, examine_gpu, version_numbers

# The oldest and the newest version of tests/stacks/matrix.sh's legs (docs/compatibility.md).
TESTED = {
    "torch": ("2.5.1", "2.15.0"),
    "transformers": ("4.51.3", "5.24.0"),
    "diffusers": ("0.29.0", "0.42.1"),
    "accelerate": ("1.15.0", "1.15.0"),
    "colossalai": ("0.5.0", "0.5.0"),
    "numpy": ("1.26.4", "2.4.6"),
    "safetensors": ("0.8.0", "0.8.0"),
    "Pillow": ("12.3.0", "13.0.0"),
}


def package_findings(installed: dict[str, str]) -> list[Finding]:
    """A finding for each of TESTED; `installed` holds the versions of those that are there."""
    found = []
    for name, (oldest, newest) in TESTED.items():
        version = installed.get(name)
        if version is None:
            found.append(Finding("problem", f"{name} is not installed", REINSTALL))
        elif name == "colossalai" and version != oldest:
            command = "python -m pip install --no-deps colossalai==0.5.0"
            found.append(Finding("problem", f"colossalai {version}: this program is made for {oldest}", command))
        elif not version_numbers(oldest) <= version_numbers(version) <= version_numbers(newest):
            tested = f"{newest} is" if oldest == newest else f"{oldest} to {newest} are"
            found.append(Finding("note", f"{name} {version}: not tested; {tested}", REINSTALL))
        else:
            found.append(Finding("ok", f"{name} {version}"))
    return found


def import_findings(package: str, module: str) -> list[Finding]:
    """That a package cannot be imported, by its module, and why; nothing if it can."""
    try:
        importlib.import_module(module)
        return []
    except Exception as error:  # a broken CUDA library raises whatever it likes
        return [Finding("problem", f"{package} cannot be imported ({first_line(error)})", REINSTALL)]


def examine() -> list[Finding]:
    """Everything about this machine and its packages."""
    installed = {}
    for name in TESTED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    python = Finding("ok", f"Python {platform.python_version()}, {platform.machine()}")
    found = [python, *package_findings(installed)]
    if "torch" in installed:
        found += import_findings("torch", "torch") or examine_gpu()
    if not any(finding.level == "problem" for finding in found):
        found += import_findings("colossalai", "utils.runtime.colossal")
    return [*found, Finding("ok", "no nvcc or Apex is needed: nothing is built on installation")]


def main(argv: list[str] | None = None) -> int:
    """Prints every finding; 1 if there is a problem."""
    argparse.ArgumentParser(prog="python -m utils.doctor", description=__doc__).parse_args(argv)
    found = examine()
    print("\n".join(map(str, found)))
    num_problems = sum(finding.level == "problem" for finding in found)
    print(f"{num_problems} problem{'' if num_problems == 1 else 's'}")
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
