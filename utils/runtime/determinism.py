"""--deterministic: kernels that give the same bits every time, so that a resumed run ends like one never killed."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import torch

from utils.errors import RunFailed

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_CHOICES = (":4096:8", ":16:8")  # those that torch takes for deterministic
MISSING_SIGN = "deterministic implementation"  # how torch complains of an operation that has none


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """A context in which torch, cuDNN and cuBLAS use deterministic kernels only; nothing happens if not `wanted`.

    To be entered before the first matrix product on a GPU: cuBLAS reads its variable then, once a process. Raises
    RunFailed if an operation has no deterministic kernel.
    """
    if not wanted:
        yield
        return
    if os.environ.get(CUBLAS_VARIABLE) not in CUBLAS_CHOICES:
        os.environ[CUBLAS_VARIABLE] = CUBLAS_CHOICES[0]
    cudnn, settings = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = cudnn.deterministic, cudnn.benchmark, settings.fill_uninitialized_memory
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn.deterministic, cudnn.benchmark = True, False
    settings.fill_uninitialized_memory = False  # every buffer here is written before it is read
    # Not warn_only: then attention's backward keeps adding with atomics, and only says so.
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if MISSING_SIGN not in str(error):
            raise
        line = str(error).strip().splitlines()[0].partition(", but you set")[0]
        raise RunFailed(f"--deterministic: {line}; leave the flag out, or update torch") from error
    finally:
        cudnn.deterministic, cudnn.benchmark, settings.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
