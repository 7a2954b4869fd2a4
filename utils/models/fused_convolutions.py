"""What fused_unet replaces between a network's blocks: the convolutions there, the last norm, the upsamplers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.kernels.linear import linear
from utils.kernels.operations import add_bias, group_norm
from utils.models.fusible import is_affine, is_biased_conv, is_plain_upsampler


def modules_of(network: nn.Module, kind: str) -> list[Any]:
    """Those of a class, by its name."""
    return [module for module in network.modules() if type(module).__name__ == kind]


def replace(module: nn.Module, forward: Any) -> None:
    """Gives a module a fused forward, which fused_unet.uninstall knows."""
    forward.is_fused = True
    module.forward = forward


def fuse_the_rest(network: Any) -> dict[str, int]:
    """Fuses what lies between the blocks of a UNet or a decoder; returns how many of each kind."""
    upsamplers = modules_of(network, "Upsample2D")
    convolutions = [network.conv_in, network.conv_out]
    convolutions += [getattr(module, "conv", None) for module in (*modules_of(network, "Downsample2D"), *upsamplers)]
    convolutions = [conv for conv in convolutions if is_biased_conv(conv)]
    for conv in convolutions:
        replace(conv, partial(_conv_forward, conv))
    upsamplers = [upsampler for upsampler in upsamplers if is_plain_upsampler(upsampler)]
    for upsampler in upsamplers:
        replace(upsampler, partial(_upsample_forward, upsampler, upsampler.forward))
    norm: Any = getattr(network, "conv_norm_out", None)
    has_norm = is_affine(norm, nn.GroupNorm)
    if has_norm:
        replace(norm, partial(_norm_forward, norm))
    return dict(norm_out=int(has_norm), upsamplers=len(upsamplers), convolutions=len(convolutions))


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product: [B, C, H, W] -> [B, O, H, W]."""
    return linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)


def _conv_forward(conv: Any, x: Tensor) -> Tensor:
    """Conv2d.forward of x [B, C, H, W], whose bias, and the bias's gradient, have kernels of their own."""
    return add_bias(F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups), conv.bias)


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    """GroupNorm.forward of x [B, C, H, W]; the result is channels_last."""
    return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=False)


def _upsample_forward(
    upsampler: Any, plain_forward: Callable, hidden_states: Tensor, output_size: int | None = None
) -> Tensor:
    """Upsample2D.forward of hidden_states [B, C, H, W] -> [B, O, 2H, 2W]."""
    if output_size is not None:
        return plain_forward(hidden_states, output_size)
    return upsampler.conv(_DoubleSize.apply(hidden_states))


class _DoubleSize(torch.autograd.Function):
    """Every pixel of [B, C, H, W] becomes four, copied whole, channels_last: [B, C, 2H, 2W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = ctx.shape = x.shape
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
        return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        size = list(dy.shape[2:])
        return torch.ops.aten.upsample_nearest2d_backward(dy, size, list(ctx.shape), 2.0, 2.0)
