"""Swaps forwards of a diffusers UNet2DConditionModel for ones that use utils.kernels, in place.

Modules, parameters, names and the state dict stay what they are; only instances' `forward` changes. What is replaced
computes the same with fewer kernels:
- GroupNorm and SiLU are one operation that stays channels_last; nothing else leaves channels_last either;
- a convolution's bias is added by the operation that follows it, which also makes its gradient;
- nothing is divided by 1;
- a residual stream's two gradients are added inside the norm's backward;
- 1x1 convolutions are matrix products; query, key and value are one where their weights lie side by side in memory;
- the time embedding goes through SiLU once, not once a ResNet block.
Anything that is not Stable Diffusion's plain configuration, or that carries hooks or another class, is left as it is.
Install after choosing attention processors.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from utils.kernels import add_bias_residual, add_layer_norm, geglu, group_norm

_KINDS = ("resnets", "transformers", "blocks", "norm_out", "time_embedding")
_PLAIN_UNET_BLOCKS = {
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
}


def install(unet: nn.Module) -> dict[str, int]:
    """Fuses what can be fused; returns how many of each kind were. Installing twice changes nothing more."""
    uninstall(unet)
    counts = dict.fromkeys(_KINDS, 0)
    resnets = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    plain_resnets = [module for module in resnets if _is_plain_resnet(module)]
    activates_once = resnets == plain_resnets != [] and _has_plain_time_embedding(unet)
    if activates_once:
        _replace(unet.time_embedding, partial(_activated_time_embedding, unet.time_embedding.forward))
        counts["time_embedding"] = 1
    for resnet in plain_resnets:
        _replace(resnet, partial(_resnet_forward, resnet, activates_once))
    counts["resnets"] = len(plain_resnets)
    for transformer in [module for module in unet.modules() if type(module).__name__ == "Transformer2DModel"]:
        blocks = [block for block in transformer.transformer_blocks if _is_plain_block(block)]
        for block in blocks:
            _replace(block, partial(_block_forward, block, block.forward))
        counts["blocks"] += len(blocks)
        if len(blocks) == len(transformer.transformer_blocks) and _is_plain_transformer(transformer):
            _replace(transformer, partial(_transformer_forward, transformer, transformer.forward))
            counts["transformers"] += 1
    norm = getattr(unet, "conv_norm_out", None)
    if _is_affine(norm, nn.GroupNorm):
        _replace(norm, partial(_norm_forward, norm))
        counts["norm_out"] = 1
    return counts


def uninstall(unet: nn.Module) -> None:
    """Puts every module's own forward back."""
    for module in unet.modules():
        if getattr(module.__dict__.get("forward"), "is_fused", False):
            del module.forward


def _replace(module: nn.Module, forward) -> None:
    forward.is_fused = True
    module.forward = forward


def _has_no_hooks(module: nn.Module) -> bool:
    """No hooks, no parametrization, and a forward of its class's own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not hasattr(module, "parametrizations") and "forward" not in module.__dict__


def _is(module, kind: type) -> bool:
    return type(module) is kind and _has_no_hooks(module)


def _is_affine(norm, kind: type) -> bool:
    return _is(norm, kind) and norm.weight is not None and norm.bias is not None


def _is_dropout_off(module) -> bool:
    return type(module) is nn.Dropout and module.p == 0


def _is_conv(conv, size: int) -> bool:
    expected = dict(kernel_size=(size, size), stride=(1, 1), padding=(size // 2,) * 2, dilation=(1, 1), groups=1)
    return (
        _is(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and all(getattr(conv, k) == v for k, v in expected.items())
    )


def _is_plain_resnet(resnet) -> bool:
    return (
        _has_no_hooks(resnet)
        and getattr(resnet, "time_embedding_norm", None) == "default"
        and resnet.upsample is None
        and resnet.downsample is None
        and _is_affine(resnet.norm1, nn.GroupNorm)
        and _is_affine(resnet.norm2, nn.GroupNorm)
        and isinstance(resnet.nonlinearity, nn.SiLU)
        and _is_conv(resnet.conv1, 3)
        and _is_conv(resnet.conv2, 3)
        and (resnet.conv_shortcut is None or _is_conv(resnet.conv_shortcut, 1))
        and _is(resnet.time_emb_proj, nn.Linear)
        and not getattr(resnet, "skip_time_act", False)
        and _is_dropout_off(resnet.dropout)
        and resnet.output_scale_factor == 1
    )


def _has_plain_time_embedding(unet) -> bool:
    """Whether the time embedding goes to the ResNet blocks and nowhere else, unchanged."""
    blocks = {type(block).__name__ for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)}
    added = ("class_embedding", "add_embedding", "time_embed_act")
    is_only_use = all(getattr(unet, name, None) is None for name in added)
    return blocks <= _PLAIN_UNET_BLOCKS and is_only_use and _has_no_hooks(unet.time_embedding)


def _is_plain_attention(attention, is_cross: bool) -> bool:
    unwanted = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj", "residual_connection",
                "fused_projections")  # fmt: skip
    return (
        _has_no_hooks(attention)
        and type(getattr(attention, "processor", None)).__name__ == "AttnProcessor2_0"
        and not any(getattr(attention, name, None) for name in unwanted)
        and attention.rescale_output_factor == 1
        and all(_is(linear, nn.Linear) and linear.bias is None for linear in _projections(attention))
        and (is_cross or attention.to_q.in_features == attention.to_k.in_features)
        and _is(attention.to_out[0], nn.Linear)
        and _is_dropout_off(attention.to_out[1])
    )


def _is_plain_block(block) -> bool:
    """A BasicTransformerBlock of self-attention, cross-attention and GEGLU, each after a LayerNorm."""
    if type(block).__name__ != "BasicTransformerBlock" or getattr(block, "norm_type", "layer_norm") != "layer_norm":
        return False
    unwanted = ("pos_embed", "fuser", "only_cross_attention", "double_self_attention", "_chunk_size")
    feed_forward = list(block.ff.net)
    return (
        _has_no_hooks(block)
        and not any(getattr(block, name, None) for name in unwanted)
        and all(_is_affine(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2, block.norm3))
        and _is_plain_attention(block.attn1, False)
        and block.attn2 is not None
        and _is_plain_attention(block.attn2, True)
        and _has_no_hooks(block.ff)
        and len(feed_forward) == 3
        and type(feed_forward[0]).__name__ == "GEGLU"
        and _has_no_hooks(feed_forward[0])
        and _is(feed_forward[0].proj, nn.Linear)
        and _is_dropout_off(feed_forward[1])
        and _is(feed_forward[2], nn.Linear)
    )


def _is_plain_transformer(transformer) -> bool:
    is_projection = partial(_is, kind=nn.Linear) if transformer.use_linear_projection else partial(_is_conv, size=1)
    return (
        _has_no_hooks(transformer)
        and transformer.is_input_continuous
        and _is_affine(transformer.norm, nn.GroupNorm)
        and is_projection(transformer.proj_in)
        and is_projection(transformer.proj_out)
    )


def _projections(attention) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.to_q, attention.to_k, attention.to_v


def _pointwise(x, weight, bias=None):
    """A 1x1 convolution as a matrix product: [B, C, H, W] -> [B, O, H, W]."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class _JointLinear(torch.autograd.Function):
    """x @ cat(weights).T by one product, for weights that are neighbours in memory: no copy is made."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return F.linear(x, _joint(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = (rows @ _joint(weights)).view(x.shape) if ctx.needs_input_grad[0] else None
        dweights = (rows.t() @ x.flatten(0, -2)).split([weight.shape[0] for weight in weights])
        return dx, *dweights


def _joint(weights):
    """One [sum of rows, columns] view of neighbouring weights."""
    first = weights[0]
    return first.as_strided((sum(weight.shape[0] for weight in weights), first.shape[1]), (first.shape[1], 1))


def _are_neighbours(weights) -> bool:
    ends = [weight.data_ptr() + weight.numel() * weight.element_size() for weight in weights]
    same_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    starts = [weight.data_ptr() for weight in weights]
    return same_storage and starts[1:] == ends[:-1] and all(weight.is_contiguous() for weight in weights)


def _project(x, linears):
    """What each linear makes of x [B, T, D], as a tuple; one product where the weights are neighbours."""
    weights = [linear.weight for linear in linears]
    if len(weights) == 1 or not _are_neighbours(weights):
        return tuple(F.linear(x, weight) for weight in weights)
    joint = _JointLinear.apply(x, *weights)
    if len({weight.shape[0] for weight in weights}) == 1:
        return joint.unflatten(-1, (len(weights), -1)).unbind(-2)
    return joint.split([weight.shape[0] for weight in weights], dim=-1)


def _attention(attention, x, context=None):
    """Multi-head attention without its output projection: x [B, T, D]; context [B, S, E], or None for x itself."""
    to_q, to_k, to_v = _projections(attention)
    if context is None:
        query_key_value = _project(x, (to_q, to_k, to_v))
    else:
        query_key_value = (to_q(x), *_project(context, (to_k, to_v)))
    heads = [states.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for states in query_key_value]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _takes_plain_forward(x, *unusual) -> bool:
    """Whether a call uses what the fused forwards do not know: masks, attention arguments, autocast."""
    return any(value is not None and value != {} for value in unusual) or torch.is_autocast_enabled()


def _add_norm(norm, x, residual, x_bias):
    return add_layer_norm(x, norm.weight, norm.bias, norm.eps, residual, x_bias)


def _norm_forward(norm, x):
    return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=False)


def _activated_time_embedding(plain_forward, *args, **kwargs):
    """The time embedding through SiLU, once for all ResNet blocks."""
    return F.silu(plain_forward(*args, **kwargs))


def _block_forward(block, plain_forward, hidden_states, attention_mask=None, encoder_hidden_states=None,
                   encoder_attention_mask=None, timestep=None, cross_attention_kwargs=None, class_labels=None,
                   added_cond_kwargs=None, input_bias=None):  # fmt: skip
    """BasicTransformerBlock.forward of hidden_states [B, T, D] + input_bias [D]."""
    unusual = attention_mask, encoder_attention_mask, cross_attention_kwargs
    if encoder_hidden_states is None or _takes_plain_forward(hidden_states, *unusual):
        hidden_states = hidden_states if input_bias is None else hidden_states + input_bias
        return plain_forward(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    attn1, attn2, (up, _, down) = block.attn1, block.attn2, block.ff.net
    hidden_states, normed = _add_norm(block.norm1, hidden_states, None, input_bias)
    out = F.linear(_attention(attn1, normed), attn1.to_out[0].weight)
    hidden_states, normed = _add_norm(block.norm2, out, hidden_states, attn1.to_out[0].bias)
    out = F.linear(_attention(attn2, normed, encoder_hidden_states), attn2.to_out[0].weight)
    hidden_states, normed = _add_norm(block.norm3, out, hidden_states, attn2.to_out[0].bias)
    return down(geglu(up.proj(normed))) + hidden_states


def _transformer_forward(transformer, plain_forward, hidden_states, encoder_hidden_states=None, timestep=None,
                         added_cond_kwargs=None, class_labels=None, cross_attention_kwargs=None, attention_mask=None,
                         encoder_attention_mask=None, return_dict=True):  # fmt: skip
    """Transformer2DModel.forward of hidden_states [B, C, H, W]; pixels become tokens without a copy."""
    unusual = attention_mask, encoder_attention_mask, cross_attention_kwargs
    if return_dict or encoder_hidden_states is None or _takes_plain_forward(hidden_states, *unusual):
        return plain_forward(
            hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels, cross_attention_kwargs,
            attention_mask, encoder_attention_mask, return_dict,
        )  # fmt: skip
    norm, proj_in, proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
    height, width = hidden_states.shape[2:]
    x, residual = group_norm(hidden_states, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=False, fork=True)
    x = F.linear(x.permute(0, 2, 3, 1).flatten(1, 2), proj_in.weight.flatten(1))
    input_bias = proj_in.bias
    for block in transformer.transformer_blocks:
        call = partial(block, encoder_hidden_states=encoder_hidden_states, input_bias=input_bias)
        checkpointed = transformer.gradient_checkpointing and torch.is_grad_enabled()
        x = checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
        input_bias = None
    x = F.linear(x, proj_out.weight.flatten(1)).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return (add_bias_residual(x, residual, proj_out.bias),)


def _resnet_forward(resnet, is_activated, input_tensor, temb, *args, **kwargs):
    """ResnetBlock2D.forward; `is_activated` says that temb has been through SiLU already."""
    norm1, conv1, norm2, conv2, shortcut = resnet.norm1, resnet.conv1, resnet.norm2, resnet.conv2, resnet.conv_shortcut
    x, residual = group_norm(
        input_tensor, norm1.weight, norm1.bias, norm1.num_groups, norm1.eps, silu=True, fork=True
    )  # fmt: skip
    x = F.conv2d(x, conv1.weight, None, padding=1)
    shift = resnet.time_emb_proj(temb if is_activated else F.silu(temb))
    x = group_norm(
        x, norm2.weight, norm2.bias, norm2.num_groups, norm2.eps, silu=True, shift=shift, shift_bias=conv1.bias
    )  # fmt: skip
    x = F.conv2d(x, conv2.weight, None, padding=1)
    if shortcut is None:
        return add_bias_residual(x, residual, conv2.bias)
    return add_bias_residual(x, _pointwise(residual, shortcut.weight), conv2.bias, shortcut.bias)
