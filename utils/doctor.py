"""What this machine has, what is wrong with it, and the command that fixes it: python -m utils.doctor"""

import argparse
import importlib
import platform
import sys

from utils.command_line import run_main
from utils.errors import first_line
from utils.runtime.gpu import REINSTALL, Finding, examine_gpu
from utils.runtime.process import versions

COLOSSALAI = "0.5.0"  # what this program is made for; of the others docs/compatibility.md says what was tried


def package_findings(installed: dict[str, str]) -> list[Finding]:
    """A finding for each package, by its version or "missing"."""
    found = []
    for name, version in installed.items():
        if version == "missing":
            found.append(Finding("problem", f"{name} is not installed", REINSTALL))
        elif name == "colossalai" and version != COLOSSALAI:
            command = f"python -m pip install --no-deps colossalai=={COLOSSALAI}"
            found.append(Finding("problem", f"colossalai {version}: this program is made for {COLOSSALAI}", command))
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
    installed = versions()
    python = Finding("ok", f"Python {installed.pop('python')}, {platform.machine()}")
    found = [python, *package_findings(installed)]
    if installed["torch"] != "missing":
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
