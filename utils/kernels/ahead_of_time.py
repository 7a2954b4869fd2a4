"""Compiles all the Triton kernels of a function at once, on all cores, instead of one by one when it first runs."""

import contextlib
import functools
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

try:
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
    from triton.runtime.cache import get_cache_manager
    from triton.runtime.jit import JITFunction
except ImportError:  # no Triton, or one before 3.4
    AsyncCompileMode = None

SECONDS_TO_COMPILE = 60.0  # a kernel, at most; most take a quarter of one


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
    with _threads_of_this_device() as executor, AsyncCompileMode(executor) as mode:
        submit = mode.submit

        def submit_ready(key: str, compile_kernel: Callable[[], Any], finalize: Callable) -> Any:
            return submit(key, functools.partial(_make_ready, key, compile_kernel), finalize)

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


def _make_ready(key: str, compile_kernel: Callable[[], Any]) -> Any:
    """The compiled kernel, ready to be launched.

    It is compiled in a child process, since Triton's compiler holds the interpreter's lock, and taken from the cache
    that the child leaves it in. What is otherwise done at its first launch is done here: Triton 3.6 builds a launcher
    in C for each signature by the system's compiler, and the kernel is loaded onto the GPU.
    """
    if not _is_cached(key):
        in_child(compile_kernel)
    kernel = compile_kernel()
    with contextlib.suppress(Exception):  # it fails again, with its message, when the kernel is launched
        _ = kernel.run
    return kernel


def _is_cached(key: str) -> bool:
    """Whether Triton's cache holds the kernel of this key."""
    folder = Path(get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).cache_dir)
    return any(folder.glob("*.json"))


def in_child(function: Callable[[], object], seconds: float = SECONDS_TO_COMPILE) -> bool:
    """Calls `function` in a copy of this process that ends with it; whether it returned within `seconds`.

    It must not use the GPU. Another thread may have held a lock when the process was copied, and the child waits for
    it for ever: then it is killed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)


def _threads_of_this_device() -> ThreadPoolExecutor:
    """As many threads as cores, in which the current GPU is the current one."""
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(os.cpu_count())
    current = torch.cuda.current_device()
    return ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(current,))
