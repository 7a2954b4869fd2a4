"""torch, diffusers and transformers: imported once, quietly, and without what nothing here uses.

Importing this module imports them, so a module that needs one of them at its top names this one first (the import
sorter's settings in pyproject.toml put it there):

    import utils.runtime.libraries

    import torch
    from diffusers import UNet2DConditionModel

ColossalAI, which training alone needs, is imported by colossal.py. What nothing here uses is hidden meanwhile, so the
libraries note that it is absent; ColossalAI, which asks for three packages by name, gets stand-ins. Afterwards all of
them can be imported as usual.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import cast

from utils.runtime.gpu import warm_up_gpu
from utils.runtime.private import IMPORTED_BY_COLOSSALAI
from utils.runtime.process import mark, nothing_collected

# What is used of each: they import their parts only when they are asked for, and it is then that they warn.
USED = {
    "transformers": ("CLIPTextModel", "CLIPTokenizer"),
    "diffusers": (
        *("AutoencoderKL", "UNet2DConditionModel", "StableDiffusionPipeline"),
        *("DDPMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"),
    ),
}
# Packages that the libraries import only because they are there. Nothing here uses them; together they take as long to
# import as torch, and one that is broken would stop a run.
UNUSED = (
    *("bitsandbytes", "flash_attn", "galore_torch", "peft", "xformers"),
    *("jax", "pandas", "sklearn", "tensorflow", "torchvision"),
)
DEPRECATIONS = "DREAMBOOTH_DEPRECATIONS"  # 1: what the libraries are about to remove is said; the tests ask for it


def import_libraries() -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with nothing_collected():
        importlib.import_module("torch")
    mark("torch imported")
    warm_up_gpu()
    with quiet_imports(), lean_imports():
        for library, names in USED.items():
            # One that has been imported before has looked for what is there, and may import it yet.
            with hidden(*(UNUSED if library not in sys.modules else ())):
                for name in names:
                    getattr(importlib.import_module(library), name)


@contextlib.contextmanager
def _as_if_imported(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """A context in which sys.modules holds these too."""
    cast(dict[str, ModuleType | None], sys.modules).update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def hidden(*packages: str) -> AbstractContextManager[None]:
    """A context in which none of the packages is found, but for those that have been imported before."""
    return _as_if_imported(dict.fromkeys(name for name in packages if name not in sys.modules))  # None: there is none


class StandIn(ModuleType):
    """In the place of a package: whatever is taken from it is an empty class."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__, self.__spec__ = [], ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_ins() -> AbstractContextManager[None]:
    """A context in which what ColossalAI names is empty classes; packages that have been imported before are left."""
    imported = {name for name in IMPORTED_BY_COLOSSALAI if name in sys.modules}
    names = [name for name in IMPORTED_BY_COLOSSALAI if not imported & {name, name.partition(".")[0]}]
    return _as_if_imported({name: StandIn(name) for name in names})


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Only errors from diffusers and transformers: their notes are about options that this program does not have."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    progress_bars = transformers_logging.is_progress_bar_enabled()
    for module, _ in before:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        with _quiet_warnings():
            yield
    finally:
        for module, verbosity in before:
            module.set_verbosity(verbosity)
        if progress_bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Holds back Python warnings and log lines below ERROR: about apex, tensornvme and quantisation kernels."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with _quiet_warnings():
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _quiet_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        if os.environ.get(DEPRECATIONS) != "1":
            warnings.simplefilter("ignore")
        else:
            for category in (UserWarning, RuntimeWarning, SyntaxWarning, ImportWarning):
                warnings.simplefilter("ignore", category)
        yield


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Takes two costs out of the imports: transformers and diffusers both list the files of every installed package,
    so the list is made once; and no garbage is collected."""
    listing = functools.cache(importlib.metadata.packages_distributions)
    with nothing_collected(), replaced(importlib.metadata, "packages_distributions", listing):
        yield


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: Callable) -> Iterator[None]:
    """A context in which `module.name` is `value`."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


import_libraries()
