"""What is trained: the UNet, its flat parameters and its optimizer, boosted."""

import functools

import torch
from torch.utils.checkpoint import checkpoint


def enable_gradient_checkpointing(unet: torch.nn.Module) -> None:
    """Recomputes activations in the backward pass.

    The random state is not saved and restored, which a CUDA graph could not capture: the UNet draws nothing.
    """
    unet.enable_gradient_checkpointing()
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for module in unet.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = recompute
