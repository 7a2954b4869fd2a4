"""What the first operation of its kind loads or looks up on a GPU, by threads while Python imports the libraries."""

import contextlib
import importlib
import threading

import torch
import torch.nn.functional as F

from utils.runtime import private
from utils.runtime.environment import local_rank
from utils.runtime.gpu import gpu_is_possible


def warm_up_gpu() -> None:
    """Begins to make this rank's GPU ready: its context, cuDNN, attention's kernels, Triton; nothing without a GPU.

    Nothing that a run depends on is touched: no random number is drawn, and cuBLAS, which reads its settings once, is
    left to whoever has made them (runtime/determinism.py).
    """
    if gpu_is_possible():
        for work in (_convolve_and_attend, _read_triton):
            threading.Thread(target=work, name="warm-up", daemon=True).start()


def _read_triton() -> None:
    """Triton knows its cached kernels by a hash of all its own files too, 0.4 s of reading, which it keeps."""
    with contextlib.suppress(Exception):  # no Triton, or another: then it reads when the first kernel is launched
        getattr(importlib.import_module(private.TRITON_CACHE), private.TRITON_KEY)()


def _convolve_and_attend() -> None:
    try:
        if not torch.cuda.is_available():
            return
        with torch.cuda.device(local_rank()), torch.enable_grad():
            image = torch.zeros(1, 64, 16, 16, dtype=torch.float16, device="cuda", requires_grad=True)
            weight = torch.zeros(64, 64, 3, 3, dtype=torch.float16, device="cuda", requires_grad=True)
            F.conv2d(image, weight, padding=1).sum().backward()
            tokens = torch.zeros(1, 8, 256, 40, dtype=torch.float16, device="cuda", requires_grad=True)
            F.scaled_dot_product_attention(tokens, tokens, tokens).sum().backward()
            torch.cuda.synchronize()
    except RuntimeError:  # whatever is wrong with this GPU is said where it is used
        pass
