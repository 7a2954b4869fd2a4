"""What the first operation of its kind loads on a GPU, loaded by a thread while Python imports the libraries."""

import threading

import torch
import torch.nn.functional as F

from utils.runtime.environment import local_rank
from utils.runtime.gpu import gpu_is_possible


def warm_up_gpu() -> None:
    """Begins to make this rank's GPU ready: its context, cuDNN, attention's kernels; nothing without a GPU.

    Nothing that a run depends on is touched: no random number is drawn, and cuBLAS, which reads its settings once, is
    left to whoever has made them (runtime/determinism.py).
    """
    if gpu_is_possible():
        threading.Thread(target=_convolve_and_attend, name="warm-up", daemon=True).start()


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
