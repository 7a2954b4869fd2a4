"""torch, ColossalAI, diffusers and transformers: imported once, in the order that works, quietly and without detours.

Importing this module imports them, so a module that needs one of them at its top names this one first (the import
sorter's settings in pyproject.toml put it there):

    import utils.runtime.libraries

    import torch
    from diffusers import UNet2DConditionModel
"""

import contextlib
import functools
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

from utils.runtime.stand_ins import stand_ins

# What is used of each: diffusers imports its parts only when they are asked for, and it is then that it warns.
COLOSSALAI = ("colossalai", "colossalai.accelerator", "colossalai.booster.plugin", "colossalai.interface")
DIFFUSERS = ("AutoencoderKL", "DDPMScheduler", "PNDMScheduler", "StableDiffusionPipeline", "UNet2DConditionModel")
TRANSFORMERS = ("CLIPTextModel", "CLIPTokenizer")


def import_libraries() -> dict[str, str]:
    """Imports them; returns each package that only ColossalAI wants and that cannot be imported, with the reason.

    ColossalAI goes first: while it is imported, stand-ins take the place of those packages, and diffusers and
    transformers note when they are imported which packages there are.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded when it runs
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with quiet_imports(), lean_imports():
        with stand_ins() as broken:
            for name in COLOSSALAI:
                importlib.import_module(name)
        for library, names in (("diffusers", DIFFUSERS), ("transformers", TRANSFORMERS)):
            for name in names:
                getattr(importlib.import_module(library), name)
    return broken


def notes_on_packages() -> list[str]:
    """What a run says when it starts: one line for each package that ColossalAI had to do without."""
    return [
        f"note: {package} cannot be imported ({reason}); training does not need it (python -m utils.doctor)"
        for package, reason in broken_packages.items()
    ]


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Takes two costs out of the imports (docs/decisions.md, 2026-11-24).

    torch.compile as a decorator imports torch's inductor, and ColossalAI and bitsandbytes decorate functions that are
    never called here: it does nothing meanwhile. transformers and diffusers both list the files of every installed
    package at import: the list is made once.
    """
    import torch

    listing = functools.cache(importlib.metadata.packages_distributions)
    with (
        replaced(torch, "compile", lambda model=None, **options: model or (lambda function: function)),
        replaced(importlib.metadata, "packages_distributions", listing),
    ):
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


broken_packages = import_libraries()
