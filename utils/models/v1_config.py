"""Stable Diffusion v1's configurations: constants, and the sizes that the tensors of a single file show."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# What the shapes of tensors do not show; a file's own metadata or the .yaml beside it may say otherwise.
UNET = dict(
    _class_name="UNet2DConditionModel",
    _diffusers_version="0.29.0",
    act_fn="silu",
    attention_head_dim=8,  # by an old mistake in the name: the number of heads
    center_input_sample=False,
    downsample_padding=1,
    flip_sin_to_cos=True,
    freq_shift=0,
    mid_block_scale_factor=1,
    norm_eps=1e-05,
    norm_num_groups=32,
    sample_size=64,
)
VAE = dict(
    _class_name="AutoencoderKL",
    _diffusers_version="0.29.0",
    act_fn="silu",
    norm_num_groups=32,
    sample_size=512,
    scaling_factor=0.18215,
)
TEXT_ENCODER = dict(
    architectures=["CLIPTextModel"],
    attention_dropout=0.0,
    bos_token_id=0,
    eos_token_id=2,
    hidden_act="quick_gelu",
    initializer_factor=1.0,
    initializer_range=0.02,
    layer_norm_eps=1e-05,
    model_type="clip_text_model",
    pad_token_id=1,
)
CHANNELS_PER_HEAD = 64  # of CLIP
SCHEDULER = dict(
    _class_name="PNDMScheduler",
    _diffusers_version="0.29.0",
    beta_end=0.012,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    clip_sample=False,
    num_train_timesteps=1000,
    prediction_type="epsilon",
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    trained_betas=None,
)
MODEL_INDEX = dict(
    _class_name="StableDiffusionPipeline",
    _diffusers_version="0.29.0",
    feature_extractor=[None, None],
    requires_safety_checker=False,
    safety_checker=[None, None],
    scheduler=["diffusers", "PNDMScheduler"],
    text_encoder=["transformers", "CLIPTextModel"],
    tokenizer=["transformers", "CLIPTokenizer"],
    unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"],
)


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a UNet by the shapes of its tensors under their original names, {name: shape}.

    Raises KeyError if one is not there that every Stable Diffusion v1 has.
    """
    first, last = shapes["input_blocks.0.0.weight"], shapes["out.2.weight"]
    steps_down = sorted(int(name.split(".")[1]) for name in shapes if name.endswith(".0.op.weight"))
    num_blocks = 1 + len(steps_down)
    per_block = steps_down[0] if steps_down else _count(shapes, r"input_blocks\.(\d+)\.0\.")
    starts = [1 + block * per_block for block in range(num_blocks)]
    down = [f"input_blocks.{start}.1.norm.weight" in shapes for start in starts]
    up = [f"output_blocks.{block * per_block}.1.norm.weight" in shapes for block in range(num_blocks)]
    middle = "middle_block.1.transformer_blocks"
    depth = _count(shapes, rf"{re.escape(middle)}\.(\d+)\.")
    found = dict(
        in_channels=first[1],
        out_channels=last[0],
        block_out_channels=[shapes[f"input_blocks.{start}.0.out_layers.3.weight"][0] for start in starts],
        layers_per_block=per_block - 1,
        cross_attention_dim=shapes[f"{middle}.0.attn2.to_k.weight"][1],
        down_block_types=["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in down],
        up_block_types=["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in up],
    )
    if len(shapes["middle_block.1.proj_in.weight"]) == 2:
        found["use_linear_projection"] = True
    if depth > 1:
        found["transformer_layers_per_block"] = depth
    if "label_emb.0.0.weight" in shapes:
        found["class_embed_type"] = "projection"
    return UNET | found


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a VAE by the shapes of its tensors under their original names. Raises KeyError."""
    num_blocks = _count(shapes, r"encoder\.down\.(\d+)\.")
    found = dict(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=[shapes[f"encoder.down.{block}.block.0.conv2.weight"][0] for block in range(num_blocks)],
        layers_per_block=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        down_block_types=["DownEncoderBlock2D"] * num_blocks,
        up_block_types=["UpDecoderBlock2D"] * num_blocks,
    )
    return VAE | found


def text_encoder_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a CLIP text model by the shapes of its tensors, less `text_model.`. Raises KeyError."""
    vocab_size, hidden_size = shapes["embeddings.token_embedding.weight"]
    found = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        projection_dim=hidden_size,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
        num_hidden_layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, hidden_size // CHANNELS_PER_HEAD),
    )
    return TEXT_ENCODER | found


CONFIGS: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "unet": unet_config,
    "vae": vae_config,
    "text_encoder": text_encoder_config,
}


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number at that place of a name."""
    numbers = (re.match(pattern, name) for name in shapes)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)
