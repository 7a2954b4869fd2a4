"""Every tensor of Stable Diffusion v1's UNet, VAE and text encoder, by its name and shape, from the configurations.

So a folder is known to be whole before a model is made, which takes seconds, and a single file gets its configuration
from its tensors. tests/models/test_layout.py compares both with diffusers and transformers.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]
FREQUENCIES_PER_CHANNEL = 4  # the time embedding is so many times as wide as the first block
WITH_ATTENTION = "CrossAttn"  # in the names of the blocks that have it
# What a configuration means that leaves a key out: the libraries' own defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "unet": dict(
        in_channels=4,
        out_channels=4,
        block_out_channels=[320, 640, 1280, 1280],
        layers_per_block=2,
        cross_attention_dim=1280,
        attention_head_dim=8,
        norm_num_groups=32,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    ),
    "vae": dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=[64],
        layers_per_block=1,
        norm_num_groups=32,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
    ),
    "text_encoder": dict(
        vocab_size=49408,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=77,
    ),
}
# How diffusers named the VAE's attention before 0.15.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def with_defaults(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's configuration with the keys that it leaves out."""
    return {**DEFAULTS[part], **config}


def today_name(part: str, name: str) -> str:
    """A tensor's name here, whichever version of the libraries wrote it."""
    if part == "text_encoder":
        return name.removeprefix("text_model.")
    start, attention, rest = name.partition(".mid_block.attentions.0.")
    module, _, parameter = rest.rpartition(".")
    return f"{start}{attention}{OLD_ATTENTION.get(module, module)}.{parameter}" if part == "vae" and rest else name


def unet_shapes(config: Mapping[str, Any]) -> Shapes:
    """{name: shape} of UNet2DConditionModel's tensors."""
    config = with_defaults("unet", config)
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    context, time = config["cross_attention_dim"], FREQUENCIES_PER_CHANNEL * channels[0]
    shapes = dict(_conv("conv_in", config["in_channels"], channels[0]))
    shapes.update(_linear("time_embedding.linear_1", channels[0], time))
    shapes.update(_linear("time_embedding.linear_2", time, time))
    skips, width = [channels[0]], channels[0]
    for block, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            shapes.update(_resnet(f"down_blocks.{block}.resnets.{layer}", width, width := channels[block], time))
            if WITH_ATTENTION in kind:
                shapes.update(_transformer(f"down_blocks.{block}.attentions.{layer}", width, context))
            skips.append(width)
        if block < len(channels) - 1:
            shapes.update(_conv(f"down_blocks.{block}.downsamplers.0.conv", width, width))
            skips.append(width)
    for layer in range(2):
        shapes.update(_resnet(f"mid_block.resnets.{layer}", width, width, time))
    shapes.update(_transformer("mid_block.attentions.0", width, context))
    for block, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            wide = width + skips.pop()
            shapes.update(_resnet(f"up_blocks.{block}.resnets.{layer}", wide, width := channels[-1 - block], time))
            if WITH_ATTENTION in kind:
                shapes.update(_transformer(f"up_blocks.{block}.attentions.{layer}", width, context))
        if block < len(channels) - 1:
            shapes.update(_conv(f"up_blocks.{block}.upsamplers.0.conv", width, width))
    shapes.update(_norm("conv_norm_out", channels[0]))
    shapes.update(_conv("conv_out", channels[0], config["out_channels"]))
    return shapes


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """{name: shape} of AutoencoderKL's tensors; its attention under today's names."""
    config = with_defaults("vae", config)
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    latent, pixels = config["latent_channels"], config["in_channels"]
    shapes = dict(_conv("encoder.conv_in", pixels, channels[0]))
    width = channels[0]
    for block, out in enumerate(channels):
        for layer in range(layers):
            shapes.update(_resnet(f"encoder.down_blocks.{block}.resnets.{layer}", width, width := out))
        if block < len(channels) - 1:
            shapes.update(_conv(f"encoder.down_blocks.{block}.downsamplers.0.conv", width, width))
    shapes.update(_vae_end("encoder", width, width, 2 * latent))
    shapes.update(_conv("decoder.conv_in", latent, width))
    for block, out in enumerate(reversed(channels)):
        for layer in range(layers + 1):
            shapes.update(_resnet(f"decoder.up_blocks.{block}.resnets.{layer}", width, width := out))
        if block < len(channels) - 1:
            shapes.update(_conv(f"decoder.up_blocks.{block}.upsamplers.0.conv", width, width))
    shapes.update(_vae_end("decoder", channels[-1], channels[0], config["out_channels"]))
    shapes.update(_conv("quant_conv", 2 * latent, 2 * latent, 1))
    shapes.update(_conv("post_quant_conv", latent, latent, 1))
    return shapes


def text_encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """{name: shape} of CLIPTextModel's tensors, less `text_model.`, which some versions leave out."""
    config = with_defaults("text_encoder", config)
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.update(_linear(f"{layer}.self_attn.{name}", width, width))
        shapes.update(_linear(f"{layer}.mlp.fc1", width, inner))
        shapes.update(_linear(f"{layer}.mlp.fc2", inner, width))
        shapes.update(_norm(f"{layer}.layer_norm1", width))
        shapes.update(_norm(f"{layer}.layer_norm2", width))
    shapes.update(_norm("final_layer_norm", width))
    return shapes


SHAPES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "unet": unet_shapes,
    "vae": vae_shapes,
    "text_encoder": text_encoder_shapes,
}


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _conv(name: str, inputs: int, outputs: int, size: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs, size, size)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _resnet(name: str, inputs: int, outputs: int, time: int = 0) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs)
    if time:
        yield from _linear(f"{name}.time_emb_proj", time, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.conv_shortcut", inputs, outputs, 1)


def _transformer(name: str, channels: int, context: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm", channels)
    yield from _conv(f"{name}.proj_in", channels, channels, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, inputs in (("attn1", channels), ("attn2", context)):
        yield f"{block}.{attention}.to_q.weight", (channels, channels)
        yield f"{block}.{attention}.to_k.weight", (channels, inputs)
        yield f"{block}.{attention}.to_v.weight", (channels, inputs)
        yield from _linear(f"{block}.{attention}.to_out.0", channels, channels)
    for number in (1, 2, 3):
        yield from _norm(f"{block}.norm{number}", channels)
    yield from _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
    yield from _linear(f"{block}.ff.net.2", 4 * channels, channels)
    yield from _conv(f"{name}.proj_out", channels, channels, 1)


def _vae_end(side: str, middle: int, last: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number in (0, 1):
        yield from _resnet(f"{side}.mid_block.resnets.{number}", middle, middle)
    yield from _norm(f"{side}.mid_block.attentions.0.group_norm", middle)
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{side}.mid_block.attentions.0.{projection}", middle, middle)
    yield from _norm(f"{side}.conv_norm_out", last)
    yield from _conv(f"{side}.conv_out", last, outputs)
