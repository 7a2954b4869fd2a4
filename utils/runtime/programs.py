"""How this environment's programs are called in the commands that are printed for the user to type."""

import os
import shutil
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def typed(name: str) -> str:
    """`python` or `torchrun` as it has to be typed here: its name if that finds this environment's, else its path."""
    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not own.exists() or (found and Path(found).parent.resolve() == own.parent.resolve()):
        return name
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)


def typed_module(name: str) -> list[str]:
    """The words that run a module, `utils.export`: in another folder than the project's Python is told where it is."""
    command = [typed("python"), "-m", name]
    return command if Path.cwd().resolve() == PROJECT else ["env", f"PYTHONPATH={PROJECT}", *command]
