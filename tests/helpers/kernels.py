"""The devices that kernels are tested on, and what the AdamW kernels read from the device."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU_MARKS)]


def adamw_scalars(step, grad_scale, applies, device, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    corrections = 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5
    return torch.tensor([grad_scale, lr, *betas, eps, weight_decay, *corrections, float(applies)], device=device)
