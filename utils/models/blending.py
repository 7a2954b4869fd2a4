"""The strength dial: UNets on the line through a base and what training made of it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from utils.errors import UserError
from utils.models.single_file import read_weights


def blend(base: torch.Tensor, tuned: torch.Tensor, strength: float) -> torch.Tensor:
    """base + strength x (tuned - base), computed in float32, in the dtype of `tuned`.

    At 1 it is `tuned` and at 0 `base`, bit for bit if their dtypes are equal; above 1 it goes beyond `tuned`. Every
    operation rounds by itself, so that every processor gives the same bits; those of torch.lerp depend on it.
    """
    if strength in (0, 1):
        return (tuned if strength else base).to(tuned.dtype)
    base = base.float()
    return (tuned.float() - base).mul_(strength).add_(base).to(tuned.dtype)


def blended_weights(base: Path, tuned: Path, strength: float) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the UNet in `tuned` at `strength`, one at a time, in the dtypes of its file.

    Args:
        base, tuned: folders with a unet/ in them, of one architecture: else UserError. At strength 1 the base is not
            read.
    """
    ours = read_weights(tuned, "unet")
    theirs = read_weights(base, "unet") if strength != 1 else ours
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        raise UserError(f"the UNets in {base} and {tuned} are not of one architecture, so nothing lies between them")
    for name, value in ours.items():
        yield name, blend(theirs[name], value, strength)


@torch.no_grad()
def load_weights(unet: torch.nn.Module, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies weights into a UNet's own tensors, so that a CUDA graph, which reads their addresses, has the new ones.

    Raises KeyError if the names are not the UNet's.
    """
    own = unet.state_dict(keep_vars=True)
    for name, value in named:
        own.pop(name).copy_(value)
    if own:
        raise KeyError(next(iter(own)))
