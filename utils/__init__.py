"""What the scripts are made of; PROGRAM is its name in the files that it writes.

Whatever is called imports this first: in words that any Python 3 understands.
"""

import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; the library reads it when it is imported
if "OMP_WAIT_POLICY" not in os.environ:
    # How often torch's threads look for each other before they sleep: by default for milliseconds, which are lost each
    # time that another program keeps one of them from running. libgomp reads it when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
__version__ = "0.1.0"  # CHANGELOG.md says what it has
PROGRAM = "train_dreambooth_colossalai"
OWN_HOME = "{}/{}-{}".format(os.environ.get("TMPDIR") or "/tmp", PROGRAM, getattr(os, "getuid", int)())
HOW_TO_INSTALL = "'bash setup.sh' installs what is needed into .venv, 'python -m utils.doctor' says what is wrong"


def _say(kind: type, error: BaseException, trace: Any) -> None:
    """What Python says of an error that nobody caught: of a package that is missing, one line."""
    if kind is not ModuleNotFoundError or "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.write(f"error: {error}; {HOW_TO_INSTALL}\n")


if sys.platform == "win32":
    sys.stderr.write("error: this program runs on Linux; on Windows use WSL 2 ('wsl --install', then call it there)\n")
    sys.exit(2)
if sys.hexversion < 0x030A0000:
    sys.stderr.write("error: this is Python {}.{}, and 3.10 or newer is needed: ".format(*sys.version_info[:2]))
    sys.stderr.write("PYTHON=python3.11 bash setup.sh makes .venv with one\n")
    sys.exit(2)
sys.excepthook = _say
# Libraries keep files below ~, which would be a folder of that name if there is neither HOME nor an account.
if not os.environ.get("HOME"):
    os.environ.pop("HOME", None)
if os.path.expanduser("~") == "~":
    os.environ["HOME"] = OWN_HOME
elif not os.access(os.path.expanduser("~"), os.W_OK):
    os.environ.setdefault("TRITON_CACHE_DIR", OWN_HOME + "/triton")  # without it no kernel could be built
