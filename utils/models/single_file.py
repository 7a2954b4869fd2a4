"""A pipeline folder as one file in the layout of the original Stable Diffusion v1 checkpoints.

ComfyUI, AUTOMATIC1111's web UI and diffusers' from_single_file read it. Works on the weight files alone, so that no
library's version and no dtype comes between: every tensor is what the folder holds, under its original name.
importing.py goes the other way.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from utils.files.atomic import replace_path
from utils.files.ownership import run_of
from utils.models.card import file_metadata, without_paths
from utils.models.folder import BaseModel, find_weights
from utils.models.saving import SAVE_DTYPES
from utils.models.weight_files import Tensors, read_onto

PREFIXES = dict(unet="model.diffusion_model.", vae="first_stage_model.", text_encoder="cond_stage_model.transformer.")
CONFIG_KEY = "diffusers_config"  # in the header: what the tensors do not say of their configuration
WITH_ATTENTION = "CrossAttn"  # in the names of the blocks that have it
# What a UNet's configuration means that leaves a key out.
V1_UNET: dict[str, Any] = dict(layers_per_block=2, up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
V1_TEXT_LAYERS = 12
# Empty tensors by whose names ComfyUI, A1111 and Forge know what a model predicts, and with which noise.
PREDICTS_VELOCITY, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
Named = tuple[str, torch.Tensor]

UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
# Both ways diffusers has named the VAE's attention: before 0.15 and since.
VAE_ATTENTION_NAMES = {
    "group_norm": "norm",
    **{"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    **{"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"},
}


def original_unet_name(name: str, layers_per_block: int, attention_up_blocks: set[int]) -> str:
    """The original name of a UNet2DConditionModel's tensor.

    Args:
        layers_per_block: the UNet's: residual blocks on the way down; one more on the way up.
        attention_up_blocks: numbers of the up blocks with attention; elsewhere the upsampler moves up a place.
    """
    kinds = "resnets|attentions|downsamplers|upsamplers"
    found = re.fullmatch(rf"(down|up)_blocks\.(\d+)\.({kinds})\.(\d+)\.(.+)", name)
    if found:
        way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        begin, end = (number * (layers_per_block + 1) for number in (block, block + 1))
        if kind == "downsamplers":
            return f"input_blocks.{end}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "upsamplers":
            return f"output_blocks.{end - 1}.{2 if block in attention_up_blocks else 1}.{rest}"
        place, rest = _unet_layer(kind, rest)
        if way == "up":
            return f"output_blocks.{begin + layer}.{place}.{rest}"
        return f"input_blocks.{begin + 1 + layer}.{place}.{rest}"  # after conv_in
    for ours, original in UNET_NAMES.items():
        if name.startswith(ours + "."):
            rest = name[len(ours) + 1 :]
            return f"{original}.{_unet_layer('resnets', rest)[1] if 'resnets' in ours else rest}"
    raise ValueError(f"the UNet's tensor {name} has no place in the original layout")


def _unet_layer(kind: str, rest: str) -> tuple[int, str]:
    """Place of a residual or attention layer in its block, and the original name of its tensor."""
    if kind == "attentions":
        return 1, rest
    module, _, parameter = rest.partition(".")
    return 0, f"{UNET_RESNET_NAMES[module]}.{parameter}"


def original_vae_name(name: str, num_blocks: int) -> str:
    """The original name of an AutoencoderKL's tensor; the decoder's blocks are counted from the other end."""
    for ours, original in VAE_NAMES.items():
        name = name.replace(ours, original)
    if ".attn_1." in name:
        start, end = name.split(".attn_1.")
        module, _, parameter = end.rpartition(".")
        return f"{start}.attn_1.{VAE_ATTENTION_NAMES[module]}.{parameter}"
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{num_blocks - 1 - int(found[1])}", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"resnets\.(\d+)", r"block.\1", name)
    return name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def original_text_name(name: str) -> str:
    """The original name of a CLIPTextModel's tensor; some versions of transformers leave out text_model."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def is_used_layer(name: str, text_encoder: Mapping[str, Any]) -> bool:
    """Whether a text encoder of that configuration has the tensor: with "clip skip" the last layers stay unused."""
    layer = re.search(r"encoder\.layers\.(\d+)\.", name)
    return layer is None or int(layer[1]) < text_encoder.get("num_hidden_layers", V1_TEXT_LAYERS)


def original_state_dict(base: BaseModel, unet_weights: Iterable[Named] | None = None) -> dict[str, torch.Tensor]:
    """A pipeline's tensors under their original names, in their files' dtypes; `unet_weights` replace unet/'s."""
    unet, folder = V1_UNET | base.configs["unet"], base.folder
    layers = unet["layers_per_block"]
    with_attention = {number for number, kind in enumerate(unet["up_block_types"]) if WITH_ATTENTION in kind}
    num_blocks = len(base.configs["vae"].get("block_out_channels") or [64])
    state_dict = {}
    for name, value in read_weights(folder, "unet").items() if unet_weights is None else unet_weights:
        state_dict[PREFIXES["unet"] + original_unet_name(name, layers, with_attention)] = value
    for name, value in read_weights(folder, "vae").items():
        original = original_vae_name(name, num_blocks)
        # The original's attention is made of 1x1 convolutions, diffusers' of linear layers.
        is_attention = ".attn_1." in original and ".norm." not in original
        value = value[:, :, None, None] if is_attention and value.dim() == 2 else value
        state_dict[PREFIXES["vae"] + original] = value
    for name, value in read_weights(folder, "text_encoder").items():
        if is_used_layer(name, base.configs["text_encoder"]):
            state_dict[PREFIXES["text_encoder"] + original_text_name(name)] = value
    return state_dict


def read_weights(folder: Path, part: str) -> Tensors:
    """The tensors of one part: from the files that diffusers would load."""
    return read_onto(find_weights(folder, part).files, "cpu")


def export_single_file(
    base: BaseModel,
    path: Path,
    dtype: str | None = None,
    unet_weights: Iterable[Named] | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes the pipeline `base` to the file `path`, whole or not at all; `dtype` fp32 or fp16 converts it.

    Args:
        unet_weights: take the place of those in the folder's unet/.
        run: the run.json of these weights, which no picture was drawn with; None: the folder's own.
    """
    state_dict = original_state_dict(base, unet_weights)
    for name, value in state_dict.items():
        wanted = SAVE_DTYPES[dtype] if dtype and value.is_floating_point() else value.dtype
        state_dict[name] = value.to(wanted).contiguous()
    if base.prediction_type == "v_prediction":
        state_dict[PREDICTS_VELOCITY] = torch.tensor([])
    if base.configs["scheduler"].get("rescale_betas_zero_snr"):
        state_dict[ZERO_TERMINAL_SNR] = torch.tensor([])
    metadata = file_metadata(base, run_of(base.folder) if run is None else run, title=path.stem)
    # So that the file can be made into the same folder again; without local paths.
    configs = {
        part: {k: v for k, v in config.items() if k != "_name_or_path"} for part, config in base.configs.items()
    }
    metadata[CONFIG_KEY] = json.dumps(without_paths(configs))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_path(path, lambda part: save_file(state_dict, part, metadata))
