"""The tensors of a part are those of diffusers' and transformers' own modules, at every size."""

import json

from utils.runtime.libraries import quiet_libraries

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.helpers.pipelines import PARTS, TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG
from tests.helpers.script import EMBEDDED
from utils.models.layout import SHAPES, today_name, unet_shapes

EMBEDDED_CONFIGS = {part: json.loads((EMBEDDED / part / "config.json").read_text()) for part in PARTS}
V1 = {
    "unet": dict(cross_attention_dim=768),
    "vae": dict(
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
}
CONFIGS = {"v1": V1, "embedded": EMBEDDED_CONFIGS}
CONFIGS["tests'"] = {"unet": UNET_CONFIG, "vae": VAE_CONFIG, "text_encoder": TEXT_CONFIG}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", CONFIGS)
def test_names_and_shapes_are_the_libraries_own(size, part):
    config = CONFIGS[size][part]
    with torch.device("meta"), quiet_libraries():
        if part == "text_encoder":
            module = CLIPTextModel(CLIPTextConfig(**config))
        else:
            module = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
    found = {today_name(part, name): tuple(value.shape) for name, value in module.state_dict().items()}
    found.pop("embeddings.position_ids", None)  # a buffer, in older versions
    assert found == SHAPES[part](config)


def test_stable_diffusion_v1_has_860_million_parameters():
    assert sum(torch.Size(shape).numel() for shape in unet_shapes(V1["unet"]).values()) == 859_520_964


def test_old_names_of_the_vaes_attention():
    name = "encoder.mid_block.attentions.0"
    assert today_name("vae", f"{name}.proj_attn.bias") == f"{name}.to_out.0.bias"
    assert today_name("vae", f"{name}.to_out.0.bias") == f"{name}.to_out.0.bias"
    assert today_name("vae", f"{name}.group_norm.weight") == f"{name}.group_norm.weight"
    assert today_name("text_encoder", "text_model.final_layer_norm.bias") == "final_layer_norm.bias"
