"""ColossalAI imports peft, bitsandbytes and galore_torch when it starts. If one is broken or missing: a stand-in.

The stand-ins last for ColossalAI's import only. Afterwards the package counts as absent, so that diffusers and
transformers, which use it if they find it, leave it alone. Packages that work are left as they are.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import cast

from utils.errors import first_line

# What ColossalAI 0.5.0 takes from each. In this order: peft uses bitsandbytes if it finds it.
IMPORTED_NAMES = {
    "bitsandbytes": {"bitsandbytes.optim": [], "bitsandbytes.optim.optimizer": ["Optimizer2State"]},
    "peft": {
        "peft.utils": [],
        "peft.utils.other": ["EMBEDDING_LAYER_NAMES", "check_file_exists_on_hf_hub"],
        "peft.utils.save_and_load": ["get_embedding_layer_name", "has_valid_embedding_base_layer"],
        "peft": ["PeftModel", "PeftType"],
    },
    "galore_torch": {"galore_torch": ["GaLoreAdafactor", "GaLoreAdamW"]},
}

ASKING = ("transformers.utils", "diffusers.utils", "accelerate.utils")


def import_error(package: str) -> str | None:
    """Why a package cannot be imported, in one line; None if it can."""
    try:
        for name in IMPORTED_NAMES.get(package, {package: []}):
            importlib.import_module(name)
    except Exception as error:  # a broken CUDA library raises whatever it likes
        return first_line(error)
    return None


@contextlib.contextmanager
def stand_ins() -> Iterator[dict[str, str]]:
    """Stands in for the packages that cannot be imported; yields each of them with the reason."""
    broken = {}
    for package in IMPORTED_NAMES:
        reason = import_error(package)
        if reason is not None:
            broken[package] = reason
            _mark_absent(package)
    # Before the stand-ins are there: these note at import, or at the first question, which packages they find.
    for library in ASKING if broken else ():
        importlib.import_module(library)
    for package in broken:
        sys.modules[package] = ModuleType(package)
        for name, attributes in IMPORTED_NAMES[package].items():
            module = sys.modules.setdefault(name, ModuleType(name))
            module.__path__, module.__spec__ = [], ModuleSpec(name, None)
            for attribute in attributes:
                setattr(module, attribute, type(attribute, (), {}))
    try:
        yield broken
    finally:
        for package in broken:
            _mark_absent(package)


def _mark_absent(package: str) -> None:
    """Forgets what was imported of a package; None is how sys.modules says that there is no such package."""
    modules = cast(dict[str, ModuleType | None], sys.modules)
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del modules[name]
    modules[package] = None
