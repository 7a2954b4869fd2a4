"""Compiles all the Triton kernels of a function at once, on all cores, instead of one by one when it first runs."""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

try:
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
    from triton.runtime.jit import JITFunction
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
    with ThreadPoolExecutor(os.cpu_count()) as executor, AsyncCompileMode(executor) as mode:

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
