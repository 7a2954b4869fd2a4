"""Compiles all the Triton kernels of a function at once, on all cores, instead of one by one when it first runs."""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from utils.runtime import private

try:
    from triton.runtime.jit import JITFunction

    threads = importlib.import_module(private.ASYNC_COMPILE)
    AsyncCompileMode, active_mode = getattr(threads, private.ASYNC_MODE), getattr(threads, private.ACTIVE_MODE)
except ImportError:  # no Triton, or one before 3.4
    AsyncCompileMode = None


def compile_ahead(function: Callable[[], object]) -> str | None:
    """Calls `function` with no Triton kernel running, while each that it launches is compiled by another thread.

    What those kernels would have written is left as it was, so `function` computes with garbage: its results must be
    thrown away. Compiled kernels stay in Triton's cache on the disk, from where a later process takes them.

    Returns why that failed, in a line, or None. After a failure kernels are compiled when they first run, as usual.
    """
    if AsyncCompileMode is None:
        return None
    try:
        with _compile_only():
            function()
    except (RuntimeError, AttributeError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


@contextlib.contextmanager
def _compile_only() -> Iterator[None]:
    """Triton's own mode for compiling in threads, switched on for launches of the autograd threads too."""
    run = JITFunction.run
    options: dict[str, Any] = {}
    if torch.cuda.is_available():  # the current GPU is the threads' too
        options = dict(initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))
    with ThreadPoolExecutor(os.cpu_count(), **options) as executor, AsyncCompileMode(executor) as mode:
        submit = mode.submit

        def submit_ready(key: str, compile_kernel: Callable[[], Any], *callbacks: Callable) -> Any:
            return submit(key, functools.partial(_make_ready, compile_kernel), *callbacks)

        mode.submit = submit_ready

        def compile_only(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            token = active_mode.set(mode)
            try:
                return run(kernel, *args, warmup=True, **kwargs)
            finally:
                active_mode.reset(token)

        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run


def _make_ready(compile_kernel: Callable[[], Any]) -> Any:
    """The compiled kernel, ready to be launched.

    What is otherwise done at its first launch is done here: Triton 3.6 builds a launcher in C for each signature, by
    the system's compiler, and the kernel is loaded onto the GPU.
    """
    kernel = compile_kernel()
    with contextlib.suppress(Exception):  # it fails again, with its message, when the kernel is launched
        _ = kernel.run
    return kernel
