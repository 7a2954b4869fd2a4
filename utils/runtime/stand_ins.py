"""ColossalAI imports peft, bitsandbytes and galore_torch when it starts. Where one is broken or missing, a stand-in.

The stand-ins last for ColossalAI's import only. Afterwards the package counts as absent, so that diffusers and
transformers, which use it where they find it, leave it alone. Packages that work are left as they are.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

# What ColossalAI 0.5.0 takes from each. In this order: peft uses bitsandbytes where it finds it.
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


def why_not(package: str) -> str | None:
    """Why a package cannot be imported, in one line; None where it can."""
    try:
        for name in IMPORTED_NAMES.get(package, {package: []}):
            importlib.import_module(name)
    except Exception as error:  # a broken CUDA library raises whatever it likes
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


@contextlib.contextmanager
def stand_ins() -> Iterator[dict[str, str]]:
    """Stands in for the packages that cannot be imported; yields each of them with the reason."""
    broken = {}
    for package in IMPORTED_NAMES:
        reason = why_not(package)
        if reason is not None:
            broken[package] = reason
            _forget(package)
            sys.modules[package] = None
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
            _forget(package)
            sys.modules[package] = None


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
