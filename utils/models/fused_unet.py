"""Swaps forwards of a UNet2DConditionModel, or of a VAE's decoder, for those of utils.kernels.operations, in place.

Modules, parameters, names and the state dict stay what they are; only instances' `forward` changes. What is replaced
computes the same with fewer kernels or faster ones:
- GroupNorm and SiLU are one operation that stays channels_last; nothing else leaves channels_last either;
- the biases of a ResNet block's convolutions are added by the operations that follow them, and so is GEGLU's;
- attention to the prompt has a backward pass that divides the work by queries;
- nothing is divided by 1;
- a residual stream's two gradients are added inside the norm's backward;
- 1x1 convolutions are matrix products; query, key and value are one if their weights lie side by side in memory;
- the time embedding's projections into all ResNet blocks are one product, and it goes through SiLU once.
Anything that is not Stable Diffusion's plain configuration, or that carries hooks or another class, is left as it is.
Install after choosing attention processors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.kernels import operations
from utils.kernels.operations import add_bias_residual, linear
from utils.runtime import private

# What is fused is made of torch's own layers, and of these, which have children of such names and no others.
PARTS = {
    private.RESNET: "norm1 conv1 time_emb_proj norm2 dropout conv2 nonlinearity conv_shortcut",
    private.TRANSFORMER: "norm proj_in transformer_blocks proj_out",
    private.BLOCK: "norm1 attn1 norm2 attn2 norm3 ff",
    private.ATTENTION: "to_q to_k to_v to_out",
    private.FEED_FORWARD: "net",
    private.GATE: "proj",
}
LAYERS = (nn.Conv2d, nn.Dropout, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.SiLU)


def install(unet: Any, equal_halves: bool = False) -> None:
    """Fuses what can be fused. Installing twice changes nothing more.

    Args:
        equal_halves: every batch is the same latents and timesteps twice, for two prompts (guidance): what precedes
            the first prompt, the longest attention among it, is computed once. In sampling they are.
    """
    uninstall(unet)
    resnets = _modules_of(unet, private.RESNET)
    plain_resnets = [resnet for resnet in resnets if is_plain_resnet(resnet)]
    shifts_at_once = resnets == plain_resnets != [] and has_plain_time_embedding(unet)
    if shifts_at_once:
        time_layers = [resnet.time_emb_proj for resnet in resnets]
        _replace(unet.time_embedding, partial(_shifts, unet.time_embedding.forward, time_layers))
    for number, resnet in enumerate(plain_resnets):
        _replace(resnet, partial(_resnet_forward, resnet, number if shifts_at_once else None))
    for transformer in _modules_of(unet, private.TRANSFORMER):
        is_whole, blocks = is_plain(transformer), list(filter(is_plain, transformer.transformer_blocks))
        for block in blocks:
            _replace(block, partial(_block_forward, block, block.forward))
        if is_whole:
            _replace(transformer, partial(_transformer_forward, transformer, transformer.forward))
    _fuse_last_norm(unet)
    if equal_halves and shifts_at_once and is_a(unet.down_blocks[0], private.FIRST_BLOCK):
        first = unet.down_blocks[0]
        for module in (first.resnets[0], first.attentions[0].transformer_blocks[0]):
            if _is_fused(module):
                _replace(module, partial(module.forward, equal_halves=True))


def install_decoder(decoder: Any) -> None:
    """Fuses what can be fused of a VAE's decoder, as `install` does."""
    uninstall(decoder)
    for resnet in _modules_of(decoder, private.RESNET):
        if is_plain_resnet(resnet, has_time=False):
            _replace(resnet, partial(_resnet_forward, resnet, None))
    _fuse_last_norm(decoder)


def uninstall(network: nn.Module) -> None:
    """Puts every module's own forward back."""
    for module in network.modules():
        if _is_fused(module):
            del module.forward


def what_is_not_fused(unet: Any) -> str | None:
    """A line about what `install` has found changed of Stable Diffusion v1's UNet, or not found; None if nothing."""
    parts = {name: _modules_of(unet, name) for name in (private.RESNET, private.BLOCK, private.TRANSFORMER)}
    parts["time_embedding"] = [unet.time_embedding]
    changed = [name for name, modules in parts.items() if not modules or not all(map(_is_fused, modules))]
    if not changed:
        return None
    return (
        f"the UNet runs without fused kernels in {', '.join(changed)}, more slowly: diffusers {version('diffusers')} "
        f"has changed these, or what they are made of"
    )


def _modules_of(network: nn.Module, kind: str) -> list[Any]:
    return [module for module in network.modules() if is_a(module, kind)]


def _replace(module: nn.Module, forward: Any) -> None:
    """Gives a module a fused forward, which `uninstall` knows."""
    forward.is_fused = True
    module.forward = forward


def _is_fused(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "is_fused", False)


def _fuse_last_norm(network: Any) -> None:
    norm: Any = getattr(network, "conv_norm_out", None)
    if type(norm) is nn.GroupNorm and has_no_hooks(norm):
        _replace(norm, partial(_group_norm, norm, silu=False))


def _attend(layer: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Multi-head attention without its output projection: x [B, T, D], context [B, S, E] or None -> [B, T, D]."""
    query, key_value = layer.to_q.weight, (layer.to_k.weight, layer.to_v.weight)
    if context is None:
        query_key_value = operations.project(x, (query, *key_value))
    else:
        query_key_value = (linear(x, query), *operations.project(context, key_value))
    heads = [states.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for states in query_key_value]
    return operations.attention(*heads).transpose(1, 2).flatten(2)


def _takes_plain_forward(*unusual: object) -> bool:
    """Whether a call uses what the fused forwards do not know: masks, attention arguments, autocast."""
    return any(value is not None and value != {} for value in unusual) or torch.is_autocast_enabled()


def _group_norm(norm: Any, x: Tensor, silu: bool, **more: Any) -> Any:
    """GroupNorm, and SiLU or not, of x [B, C, H, W]; the result is channels_last."""
    return operations.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, **more)


def _add_norm(norm: Any, x: Tensor, residual: Tensor | None, x_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """s = x + residual + x_bias, and LayerNorm(s): x, residual [B, T, D]; x_bias [D]; the last two may be None."""
    return operations.add_layer_norm(x, norm.weight, norm.bias, norm.eps, residual, x_bias)


def _shifts(plain_forward: Callable, layers: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """In place of the time embedding: what each ResNet block's projection makes of it, [B, O] each, by one product."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    shifts = F.linear(F.silu(plain_forward(*args, **kwargs)), weight, bias)
    return shifts.split([layer.out_features for layer in layers], dim=1)


def _block_forward(
    block: Any,
    plain_forward: Callable,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    *others: Any,
    input_bias: Tensor | None = None,
    equal_halves: bool = False,
    **named: Any,
) -> Tensor:
    """BasicTransformerBlock.forward of hidden_states [B, T, D] + input_bias [D], encoder_hidden_states [B, S, E]."""
    if encoder_hidden_states is None or _takes_plain_forward(attention_mask, *others, *named.values()):
        hidden_states = hidden_states if input_bias is None else hidden_states + input_bias
        return plain_forward(hidden_states, attention_mask, encoder_hidden_states, *others, **named)
    attn2, (up, _, down) = block.attn2, block.ff.net
    if equal_halves:
        halves = _self_attention(block, hidden_states.chunk(2)[0], input_bias)
        hidden_states, normed = (torch.cat([half, half]) for half in halves)
    else:
        hidden_states, normed = _self_attention(block, hidden_states, input_bias)
    out = linear(_attend(attn2, normed, encoder_hidden_states), attn2.to_out[0].weight)
    hidden_states, normed = _add_norm(block.norm3, out, hidden_states, attn2.to_out[0].bias)
    gated = operations.geglu(linear(normed, up.proj.weight), up.proj.bias)
    return operations.add_bias_residual_of_tokens(linear(gated, down.weight), hidden_states, down.bias)


def _self_attention(block: Any, hidden_states: Tensor, input_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A block's hidden states [B, T, D] after its self-attention, and what its second norm makes of them [B, T, D]."""
    hidden_states, normed = _add_norm(block.norm1, hidden_states, None, input_bias)
    to_out = block.attn1.to_out[0]
    return _add_norm(block.norm2, linear(_attend(block.attn1, normed), to_out.weight), hidden_states, to_out.bias)


def _transformer_forward(
    transformer: Any,
    plain_forward: Callable,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *others: Any,
    return_dict: bool = True,
    **named: Any,
) -> Any:
    """Transformer2DModel.forward of hidden_states [B, C, H, W]; pixels become tokens without a copy."""
    if return_dict or encoder_hidden_states is None or _takes_plain_forward(*others, *named.values()):
        return plain_forward(hidden_states, encoder_hidden_states, *others, return_dict=return_dict, **named)
    proj_in, proj_out = transformer.proj_in, transformer.proj_out
    height, width = hidden_states.shape[2:]
    x, residual = _group_norm(transformer.norm, hidden_states, silu=False, fork=True)
    x = linear(x.permute(0, 2, 3, 1).flatten(1, 2), proj_in.weight)
    input_bias = proj_in.bias
    for block in transformer.transformer_blocks:
        call = partial(block, encoder_hidden_states=encoder_hidden_states, input_bias=input_bias)
        checkpointed = transformer.gradient_checkpointing and torch.is_grad_enabled()
        x = checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
        input_bias = None
    x = linear(x, proj_out.weight).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return (add_bias_residual(x, residual, proj_out.bias),)


def _resnet_forward(
    resnet: Any,
    number: int | None,
    input_tensor: Tensor,
    temb: Any,
    *args: Any,
    equal_halves: bool = False,
    **kwargs: Any,
) -> Tensor:
    """ResnetBlock2D.forward of input_tensor [B, C, H, W] -> [B, O, H, W].

    `temb` is the time embedding [B, E], None in a VAE, or, for a block that has a number, what `_shifts` returns.
    """
    if number is not None:
        shift = temb[number]
    else:
        shift = None if temb is None else resnet.time_emb_proj(F.silu(temb))
    if equal_halves:
        half = _shifted_resnet(resnet, input_tensor.chunk(2)[0], shift.chunk(2)[0])
        return torch.cat([half, half])
    return _shifted_resnet(resnet, input_tensor, shift)


def _shifted_resnet(resnet: Any, input_tensor: Tensor, shift: Tensor | None) -> Tensor:
    """A ResNet block of input_tensor [B, C, H, W], whose second norm's input is shifted by [B, O], if at all."""
    conv1, conv2, shortcut = resnet.conv1, resnet.conv2, resnet.conv_shortcut
    x, residual = _group_norm(resnet.norm1, input_tensor, silu=True, fork=True)
    x = F.conv2d(x, conv1.weight, None, padding=1)
    x = _group_norm(resnet.norm2, x, silu=True, shift=shift, shift_bias=conv1.bias)
    x = F.conv2d(x, conv2.weight, None, padding=1)
    if shortcut is None:
        return add_bias_residual(x, residual, conv2.bias)
    residual = linear(residual.permute(0, 2, 3, 1), shortcut.weight).permute(0, 3, 1, 2)
    return add_bias_residual(x, residual, conv2.bias, shortcut.bias)


def is_a(module: Any, kind: str) -> bool:
    """Whether a module is of diffusers' class of that name."""
    return type(module).__name__ == kind


def has_no_hooks(module: Any) -> bool:
    """No hooks, no parametrization, and a forward of its class's own."""
    has_hooks = any(getattr(module, name) for name in private.HOOKS)
    return not has_hooks and not hasattr(module, "parametrizations") and "forward" not in module.__dict__


def is_plain(module: Any) -> bool:
    """Whether a module is made of PARTS and LAYERS alone, as they are in Stable Diffusion v1, and drops nothing.

    What its configuration could change besides, models/check.py has compared with v1's.
    """
    return all(map(_is_plain_part, module.modules()))


def _is_plain_part(part: Any) -> bool:
    kind, is_layer = type(part).__name__, type(part) in LAYERS
    if not (is_layer or kind in PARTS) or not has_no_hooks(part) or getattr(part, "p", 0) != 0:
        return False
    if kind == private.ATTENTION and not is_plain_attention(part):
        return False
    return is_layer or {name for name, _ in part.named_children()} <= set(PARTS[kind].split())


def is_plain_attention(layer: Any) -> bool:
    """Multi-head attention by scaled_dot_product_attention, whose projections but the last have no bias."""
    has_bias = any(each.bias is not None for each in (layer.to_q, layer.to_k, layer.to_v))
    is_changed = has_bias or layer.residual_connection or layer.rescale_output_factor != 1
    return is_a(layer.processor, private.PROCESSOR) and not is_changed


def is_plain_resnet(resnet: Any, has_time: bool = True) -> bool:
    """A ResnetBlock2D with a time embedding added in between, or without."""
    norms = ("default",) if has_time else ("default", "group")
    is_timed = resnet.time_embedding_norm in norms and has_time == (resnet.time_emb_proj is not None)
    return is_plain(resnet) and is_timed and not resnet.skip_time_act and resnet.output_scale_factor == 1


def has_plain_time_embedding(unet: Any) -> bool:
    """Whether the time embedding goes to the ResNet blocks and nowhere else, unchanged."""
    blocks = {type(block).__name__ for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)}
    added = ("class_embedding", "add_embedding", "time_embed_act")
    is_only_use = all(getattr(unet, name, None) is None for name in added)
    return blocks <= set(private.UNET_BLOCKS) and is_only_use and has_no_hooks(unet.time_embedding)
