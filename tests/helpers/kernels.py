"""What tests of kernels share: the devices, AdamW's scalars, moments in 8 bits, the error."""

import os

import pytest
import torch

from utils.kernels.rounding import split_
from utils.training.packed import EightBit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_ONLY = "says something about Triton only"
GPU_MARKS = [pytest.mark.gpu]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU_MARKS)]


def adamw_scalars(step, grad_scale, applies, device, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    corrections = 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5
    number = step if applies else step - 1
    return torch.tensor([grad_scale, lr, *betas, eps, weight_decay, *corrections, applies, number], device=device)


def relative_error(result, expected):
    return ((result.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm()).item()


def split(
    master: torch.Tensor, dtype: torch.dtype | None, number: int = 0, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights in `dtype` and remainders of the master [N]; without a dtype a copy of it, and None."""
    if dtype is None:
        return master.clone(), None
    weight, remainder = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int16)
    split_(weight, remainder, master, number, first)
    return weight, remainder


def make_eight_bit(numel: int, signed: bool, device="cpu") -> EightBit:
    return EightBit.zeros(numel, signed=signed, device=torch.device(device), on_host=False)
