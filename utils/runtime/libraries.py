"""torch, diffusers and transformers without their warnings, and without what their imports need not cost."""

import contextlib
import functools
import importlib.metadata
import logging
import warnings


@contextlib.contextmanager
def quiet_libraries():
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
def quiet_imports():
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
def lean_imports():
    """Takes two costs out of the imports (docs/decisions.md, 2026-11-24).

    torch.compile as a decorator imports torch's inductor, and ColossalAI and bitsandbytes decorate functions that are
    never called here: it does nothing meanwhile. transformers and diffusers both list the files of every installed
    package at import: the list is made once.
    """
    import torch

    compile_, torch.compile = torch.compile, lambda model=None, **options: model or (lambda function: function)
    importlib.metadata.packages_distributions = functools.cache(importlib.metadata.packages_distributions)
    try:
        yield
    finally:
        torch.compile = compile_
        importlib.metadata.packages_distributions = importlib.metadata.packages_distributions.__wrapped__
