"""Which modules of a diffusers UNet are Stable Diffusion's plain ones, so that fused_unet may replace them."""

from functools import partial
from typing import Any

from torch import nn

from utils.runtime.private import BLOCK, FEED_FORWARD, HOOKS, PROCESSOR, UNET_BLOCKS


def is_a(module: Any, kind: str) -> bool:
    """Whether a module is of diffusers' class of that name."""
    return type(module).__name__ == kind


def has_no_hooks(module: Any) -> bool:
    """No hooks, no parametrization, and a forward of its class's own."""
    has_hooks = any(getattr(module, name) for name in HOOKS)
    return not has_hooks and not hasattr(module, "parametrizations") and "forward" not in module.__dict__


def _is(module: Any, kind: type) -> bool:
    return type(module) is kind and has_no_hooks(module)


def is_affine(norm: Any, kind: type) -> bool:
    """A norm or a linear layer of this very class with weight and bias."""
    return _is(norm, kind) and norm.weight is not None and norm.bias is not None


def is_dropout_off(module: Any) -> bool:
    """A dropout that drops nothing."""
    return type(module) is nn.Dropout and module.p == 0


def is_conv(conv: Any, size: int) -> bool:
    """A convolution of `size` x `size` that keeps height and width and pads with zeros."""
    expected = dict(kernel_size=(size, size), stride=(1, 1), padding=(size // 2,) * 2, dilation=(1, 1), groups=1)
    has_its_form = all(getattr(conv, name, None) == value for name, value in expected.items())
    return _is(conv, nn.Conv2d) and conv.padding_mode == "zeros" and has_its_form


def is_plain_resnet(resnet: Any, has_time: bool = True) -> bool:
    """A ResnetBlock2D: GroupNorm, SiLU and convolution, twice, with a time embedding added in between or without."""
    return (
        has_no_hooks(resnet)
        and getattr(resnet, "time_embedding_norm", None) in (("default",) if has_time else ("default", "group"))
        and resnet.upsample is None
        and resnet.downsample is None
        and is_affine(resnet.norm1, nn.GroupNorm)
        and is_affine(resnet.norm2, nn.GroupNorm)
        and isinstance(resnet.nonlinearity, nn.SiLU)
        and is_conv(resnet.conv1, 3)
        and is_conv(resnet.conv2, 3)
        and (resnet.conv_shortcut is None or is_conv(resnet.conv_shortcut, 1))
        and (is_affine(resnet.time_emb_proj, nn.Linear) if has_time else resnet.time_emb_proj is None)
        and not getattr(resnet, "skip_time_act", False)
        and is_dropout_off(resnet.dropout)
        and resnet.output_scale_factor == 1
    )


def has_plain_time_embedding(unet: Any) -> bool:
    """Whether the time embedding goes to the ResNet blocks and nowhere else, unchanged."""
    blocks = {type(block).__name__ for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)}
    added = ("class_embedding", "add_embedding", "time_embed_act")
    is_only_use = all(getattr(unet, name, None) is None for name in added)
    return blocks <= set(UNET_BLOCKS) and is_only_use and has_no_hooks(unet.time_embedding)


def is_plain_attention(attention: Any, is_cross: bool) -> bool:
    """Multi-head attention by scaled_dot_product_attention, whose projections but the last have no bias."""
    unwanted = ["spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj"]
    unwanted += ["residual_connection", "fused_projections"]
    return (
        has_no_hooks(attention)
        and is_a(getattr(attention, "processor", None), PROCESSOR)
        and not any(getattr(attention, name, None) for name in unwanted)
        and attention.rescale_output_factor == 1
        and all(_is(linear, nn.Linear) and linear.bias is None for linear in projections(attention))
        and (is_cross or attention.to_q.in_features == attention.to_k.in_features)
        and _is(attention.to_out[0], nn.Linear)
        and is_dropout_off(attention.to_out[1])
    )


def is_plain_block(block: Any) -> bool:
    """A BasicTransformerBlock of self-attention, cross-attention and GEGLU, each after a LayerNorm."""
    if not is_a(block, BLOCK) or getattr(block, "norm_type", "layer_norm") != "layer_norm":
        return False
    unwanted = ("pos_embed", "fuser", "only_cross_attention", "double_self_attention")
    feed_forward = list(block.ff.net)
    return (
        has_no_hooks(block)
        and not any(getattr(block, name, None) for name in unwanted)
        and all(is_affine(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2, block.norm3))
        and is_plain_attention(block.attn1, False)
        and block.attn2 is not None
        and is_plain_attention(block.attn2, True)
        and has_no_hooks(block.ff)
        and len(feed_forward) == 3
        and is_a(feed_forward[0], FEED_FORWARD)
        and has_no_hooks(feed_forward[0])
        and _is(feed_forward[0].proj, nn.Linear)
        and is_dropout_off(feed_forward[1])
        and _is(feed_forward[2], nn.Linear)
    )


def is_plain_transformer(transformer: Any) -> bool:
    """A Transformer2DModel over images: GroupNorm, and a projection into and out of its blocks."""
    is_projection = partial(_is, kind=nn.Linear) if transformer.use_linear_projection else partial(is_conv, size=1)
    return (
        has_no_hooks(transformer)
        and transformer.is_input_continuous
        and is_affine(transformer.norm, nn.GroupNorm)
        and is_projection(transformer.proj_in)
        and is_projection(transformer.proj_out)
    )


def projections(attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Those of query, key and value."""
    return attention.to_q, attention.to_k, attention.to_v
