"""Packages that the libraries import only because they are there, or because ColossalAI names them.

Nothing here uses them; together they take as long to import as torch, and one that is broken would stop a run. While
the libraries are imported they are hidden, so diffusers and transformers note that they are absent; ColossalAI, which
asks for three of them by name, gets stand-ins. Afterwards all of them can be imported as usual.
"""

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import cast

UNUSED = (
    "bitsandbytes",
    "flash_attn",
    "galore_torch",
    "jax",
    "pandas",
    "peft",
    "sklearn",
    "tensorflow",
    "torchvision",
    "xformers",
)

# What ColossalAI 0.5.0 imports at its start whatever part of it is used, and what it takes from there.
IMPORTED_NAMES = {
    "bitsandbytes": [],
    "bitsandbytes.optim": [],
    "bitsandbytes.optim.optimizer": ["Optimizer2State"],
    "galore_torch": ["GaLoreAdafactor", "GaLoreAdamW"],
    "peft": ["PeftModel", "PeftType"],
    "peft.utils": [],
    "peft.utils.other": ["EMBEDDING_LAYER_NAMES", "check_file_exists_on_hf_hub"],
    "peft.utils.save_and_load": ["get_embedding_layer_name", "has_valid_embedding_base_layer"],
}


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """A context in which none of the packages is found, but for those that have been imported before."""
    modules = cast(dict[str, ModuleType | None], sys.modules)
    hides = [name for name in packages if name not in modules]
    modules.update(dict.fromkeys(hides))  # None is how sys.modules says that there is no such package
    try:
        yield
    finally:
        for name in hides:
            modules.pop(name, None)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """A context in which what ColossalAI names is empty classes; packages that have been imported before are left."""
    imported = {name for name in IMPORTED_NAMES if name in sys.modules}
    names = [name for name in IMPORTED_NAMES if not imported & {name, name.partition(".")[0]}]
    for name in names:
        module = sys.modules[name] = ModuleType(name)
        module.__path__, module.__spec__ = [], ModuleSpec(name, None)
        for attribute in IMPORTED_NAMES[name]:
            setattr(module, attribute, type(attribute, (), {}))
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
