"""What a training's output is written as: a pipeline folder, one checkpoint file, or a LoRA; each at any strength.

A strength is a place on the line through a base's UNet and what training made of it. A LoRA holds the largest singular
values of every layer's change; its names are those of kohya's sd-scripts, which diffusers' load_lora_weights, ComfyUI
and AUTOMATIC1111's web UI read. Linear layers and convolutions are in it; biases and norms, which a LoRA cannot hold,
keep the base's values.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.files import ownership
from utils.files.atomic import replace_path
from utils.files.ownership import EXPORTED_FROM, run_of
from utils.models.card import CHECKPOINT_STEP, STRENGTH, file_metadata, write_card
from utils.models.check import check_same_unet
from utils.models.folder import UNET_STEM, BaseModel, find_weights, read_base
from utils.models.saving import SAVE_DTYPES, commit_pipeline, write_safetensors
from utils.models.single_file import read_weights

LORA_PREFIX = "lora_unet_"


def check_export_folder(target: Path, source: Path) -> None:
    """A pipeline folder can be written to `target`: it is new, empty, or was exported before. Raises UserError."""
    if ownership.overlap(target, source):
        raise UserError(f"{target} overlaps {source}: give the new pipeline a folder of its own")
    if os.path.lexists(target) and not target.is_dir():
        raise UserError(f"{target} is a file: name a new folder, or a file that ends in .safetensors")
    if ownership.kept_names(target) and EXPORTED_FROM not in run_of(target):
        raise UserError(f"{target} holds files that no export wrote: name an empty or a new folder")
    ownership.check_writable(target, target)


def exported_record(folder: Path, tuned: Path, strength: float) -> dict[str, Any]:
    """The run.json of `folder` for the weights of `tuned` at `strength`, less what was measured; empty for a base."""
    record = run_of(folder)
    if not record or (tuned == folder and strength == 1):
        return record
    said, num_steps = {STRENGTH: strength * record.get(STRENGTH, 1)}, (record.get("result") or {}).get("num_steps")
    if tuned != folder and (found := ownership.CHECKPOINT_NAME.fullmatch(tuned.name)):
        num_steps = said[CHECKPOINT_STEP] = int(found[1])
    return record | said | dict(result=dict(num_steps=num_steps))


def export_folder(model: BaseModel, tuned: Path, base: Path, target: Path, strength: float, dtype: str | None) -> None:
    """Writes a pipeline folder: all of `model`, with the UNet of `tuned` at `strength` of its way from `base`.

    Its run.json is the model's, with where it came from, so that evaluate.py finds prompts and photos. An earlier
    export's card and picture, which tell of other weights, go. `dtype` is the UNet's; None: as in `tuned`.
    """
    target.mkdir(parents=True, exist_ok=True)
    save_dtype = SAVE_DTYPES[dtype or find_weights(tuned, "unet").save_dtype]
    named = list(blended_weights(base, tuned, strength))
    record = exported_record(model.folder, tuned, strength) | {EXPORTED_FROM: str(tuned)}
    commit_pipeline(
        target, model, lambda unet: write_safetensors(unet / f"{UNET_STEM}.safetensors", named, save_dtype), record
    )
    write_card(read_base(target))


def export_lora(
    model: BaseModel, tuned: Path, base: Path, path: Path, rank: int, strength: float, dtype: str | None
) -> float:
    """Writes the change from `base` to `tuned` as a LoRA to the file `path`; returns how much of it is in there.

    The file's header says what the run.json of `model` says. `dtype` None is fp16, as LoRA files usually are.
    """
    state_dict, share = extract_lora(base, tuned, rank, strength=strength, dtype=SAVE_DTYPES[dtype or "fp16"])
    path.parent.mkdir(parents=True, exist_ok=True)
    run = exported_record(model.folder, tuned, strength)
    metadata = file_metadata(model, run, title=path.stem, is_lora=True)
    metadata |= {  # of kohya's keys those by which UIs sort LoRAs and offer their prompts
        "ss_output_name": path.stem,
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_tag_frequency": json.dumps({"photos": ownership.prompts_of(run)}, ensure_ascii=False),
        "ss_network_module": "networks.lora",  # linear layers, and convolutions as in LoCon
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_network_args": json.dumps(dict(conv_dim=str(rank), conv_alpha=str(rank))),
    }
    replace_path(path, lambda part: save_file(state_dict, part, metadata))
    return share


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
    """(name, tensor) of the UNet in `tuned` at `strength`, one at a time; UserError for another architecture."""
    if strength != 1:
        check_same_unet(base, tuned)
    ours = read_weights(tuned, "unet")
    theirs = read_weights(base, "unet") if strength != 1 else ours
    for name, value in ours.items():
        yield name, blend(theirs[name], value, strength)


@torch.no_grad()
def load_weights(unet: torch.nn.Module, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies weights into a UNet's own tensors, whose addresses a CUDA graph reads; KeyError for other names."""
    own = unet.state_dict(keep_vars=True)
    for name, value in named:
        own.pop(name).copy_(value)
    if own:
        raise KeyError(next(iter(own)))


def extract_lora(
    base: Path, tuned: Path, rank: int, *, strength: float = 1.0, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], float]:
    """The LoRA of `rank` nearest to strength x (tuned - base), and its share of the squared change, in [0, 1].

    A layer with fewer singular values has as many as it has. Raises UserError if the two are equal: nothing would be
    in the file.
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
        layer = LORA_PREFIX + name.removesuffix(".weight").replace(".", "_")
        state_dict[f"{layer}.lora_down.weight"] = down
        state_dict[f"{layer}.lora_up.weight"] = up
        state_dict[f"{layer}.alpha"] = torch.tensor(rank, dtype=dtype)
        held += float(change.square().sum() - (change - product(down.double(), up.double()) / scale**2).square().sum())
    if not state_dict:
        raise UserError(f"the UNets in {base} and {tuned} are equal: there is no change to write as a LoRA")
    return state_dict, held / whole


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
