"""What training changed, as a small file: a LoRA of the largest singular values of every layer's change.

The names are those of kohya's sd-scripts, which diffusers' load_lora_weights, ComfyUI and AUTOMATIC1111's web UI read.
Linear layers and convolutions are in it; biases and norms, which a LoRA cannot hold, keep the base's values.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.errors import UserError
from utils.files.ownership import prompts_of
from utils.models.blending import blended_weights
from utils.models.single_file import read_weights

PREFIX = "lora_unet_"
LAYOUT = "https://github.com/kohya-ss/sd-scripts"  # ModelSpec's name for it
NETWORK_MODULE = "networks.lora"  # kohya's name of the layout: linear layers, and convolutions as in LoCon


class Lora(NamedTuple):
    """The tensors of a LoRA file, and how much of the whole change they hold.

    Attributes:
        share: squared change that the file holds, of the squared change of all weights, in [0, 1].
    """

    state_dict: dict[str, torch.Tensor]
    share: float


def extract_lora(base: Path, tuned: Path, rank: int, *, strength: float = 1.0, dtype: torch.dtype) -> Lora:
    """The LoRA of `rank` that is nearest to strength x (tuned - base).

    Args:
        base, tuned: folders with a unet/ in them.
        rank: singular values a layer; a layer with fewer has as many as it has.

    Raises UserError if the two are equal: nothing would be in the file.
    """
    before, state_dict, held, whole = read_weights(base, "unet"), {}, 0.0, 0.0
    for name, value in blended_weights(base, tuned, strength):
        change = value.double() - before[name].double()
        whole += float(change.square().sum())
        if change.dim() < 2 or not change.any():
            continue
        # Readers multiply by alpha / rank. One alpha for all layers, also for those of a smaller rank: diffusers 0.42
        # does not find the alpha of an attention layer that has one of its own.
        scale = math.sqrt(min(rank, *change.flatten(1).shape) / rank)
        down, up = ((scale * factor).to(dtype).contiguous() for factor in factors(change, rank))
        layer = PREFIX + name.removesuffix(".weight").replace(".", "_")
        state_dict[f"{layer}.lora_down.weight"] = down
        state_dict[f"{layer}.lora_up.weight"] = up
        state_dict[f"{layer}.alpha"] = torch.tensor(rank, dtype=dtype)
        held += float(change.square().sum() - (change - product(down.double(), up.double()) / scale**2).square().sum())
    if not state_dict:
        raise UserError(f"the UNets in {base} and {tuned} are equal: there is no change to write as a LoRA")
    return Lora(state_dict, held / whole)


def factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) whose product is the nearest of its rank to a layer's change (Eckart and Young).

    Args:
        change: [O,I] of a linear layer, [O,I,h,w] of a convolution; float64.

    Returns: [R,I] and [O,R]; of a convolution [R,I,h,w] and [O,R,1,1].
    """
    matrix = change.flatten(1)
    rank = min(rank, *matrix.shape)
    # Eigenvectors of the smaller Gram matrix are the singular vectors, at a fraction of an SVD's time.
    is_wide = matrix.shape[0] <= matrix.shape[1]
    _, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    vectors = vectors[:, -rank:].flip(1)
    up, down = (vectors, vectors.T @ matrix) if is_wide else (matrix @ vectors, vectors.T)
    # The singular value goes half into each, so that neither is small enough for fp16 to round it away.
    norms = (down if is_wide else up.T).norm(dim=1)
    norms = torch.where(norms > 1e-9 * norms[0], norms.sqrt(), 1.0)  # one that is nothing but rounding stays tiny
    up, down = (up * norms, down / norms[:, None]) if is_wide else (up / norms, down * norms[:, None])
    shape = change.shape
    return down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *(1 for _ in shape[2:]))


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The change that two factors stand for, in the layer's shape."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def network_metadata(run: Mapping[str, Any], title: str, rank: int) -> dict[str, str]:
    """Of kohya's ss_* keys those by which UIs sort LoRAs and offer their prompts."""
    return {
        "ss_output_name": title,
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_tag_frequency": json.dumps({"photos": prompts_of(run)}, ensure_ascii=False),
        "ss_network_module": NETWORK_MODULE,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_network_args": f'{{"conv_dim": "{rank}", "conv_alpha": "{rank}"}}',
    }
