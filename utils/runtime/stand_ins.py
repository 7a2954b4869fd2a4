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

from utils.runtime.private import IMPORTED_BY_COLOSSALAI

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


class StandIn(ModuleType):
    """In the place of a package: whatever is taken from it is an empty class."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__, self.__spec__ = [], ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """A context in which what ColossalAI names is empty classes; packages that have been imported before are left."""
    imported = {name for name in IMPORTED_BY_COLOSSALAI if name in sys.modules}
    names = [name for name in IMPORTED_BY_COLOSSALAI if not imported & {name, name.partition(".")[0]}]
    sys.modules.update({name: StandIn(name) for name in names})
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
