"""The operations of a training step, one by one: does each give the same bits every time it is run?

Shapes are those of Stable Diffusion v1.4's UNet at 512 px and batch 1; with `small` a few that a CPU does at once.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.kernels import operations, updates

ATTENTION = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # pixels, width of a head; keys: as many, or 77
BACKENDS = ("DEFAULT", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
TOKENS = ((4096, 320), (1024, 640), (256, 1280), (64, 1280))
IMAGES = ((320, 64), (960, 64), (640, 32), (1920, 32), (1280, 16), (2560, 16), (1280, 8), (2560, 8))
SMALL = dict(attention=((64, 8),), tokens=((64, 32),), images=((32, 8),))
PARAMETERS = (320 * 320 * 9, 320, 1280 * 1280, 2568, 1000)  # numbers of elements; the optimizer's kernels take any


class Case(NamedTuple):
    """One operation: `make()` gives a function without arguments that runs it and returns what it made, in order."""

    kind: str
    shape: str
    make: Callable[[], Callable[[], list[torch.Tensor]]]


def differing(run: Callable[[], list[torch.Tensor]], repeats: int) -> dict:
    """Which results of `run()` differ in bits from its first ones, and its median time: dict(same, differs, ms)."""
    first = [value.detach().clone() for value in run()]
    differs, seconds = [False] * len(first), []
    for _ in range(repeats):
        begin = time.perf_counter()
        found = run()
        if found[0].is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        differs = [before or differ(one, now) for before, one, now in zip(differs, first, found, strict=True)]
    return dict(same=not any(differs), differs=differs, ms=round(1e3 * statistics.median(seconds), 3))


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ in any bit; a NaN is the same as itself."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return not torch.equal(one.contiguous().view(kind), other.detach().contiguous().view(kind))


def forward_backward(function: Callable, inputs: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """A run of `function` forward and backward on fixed inputs: its outputs, then the gradient of each input."""
    inputs = [value.detach().requires_grad_() for value in inputs]

    def as_list(outputs) -> list[torch.Tensor]:
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    with torch.no_grad():
        output_grads = [torch.randn_like(output) for output in as_list(function(*inputs))]

    def run() -> list[torch.Tensor]:
        outputs = as_list(function(*inputs))
        return [*outputs, *torch.autograd.grad(outputs, inputs, output_grads)]

    return run


def cases(unet_config: dict, device: str, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """All of them: attention, convolutions and matrix products of the UNet, our own kernels."""
    place = dict(device=device, dtype=dtype)
    chosen = SMALL if small else dict(attention=ATTENTION, tokens=TOKENS, images=IMAGES)
    for queries, width in chosen["attention"]:
        for keys in (queries, 77):
            for backend in BACKENDS:
                yield attention_case(backend, queries, keys, width, place)
    convolutions, linears = layer_shapes(unet_config)
    for shape in sorted(convolutions):
        yield convolution_case(*shape, place)
    for shape in sorted(linears):
        yield linear_case(*shape, place)
    yield from fused_cases(chosen["images"], chosen["tokens"], place)
    yield from optimizer_cases(place)


def layer_shapes(unet_config: dict) -> tuple[set, set]:
    """(channels in, out, stride, side) of the 3x3 convolutions, (rows, in, out) of the matrix products of a UNet."""
    from diffusers import UNet2DConditionModel

    convolutions, linears = set(), set()

    def note(module, inputs, _) -> None:
        x = inputs[0]
        if isinstance(module, torch.nn.Linear):
            linears.add((x.numel() // x.shape[-1], module.in_features, module.out_features))
        elif module.kernel_size == (1, 1):  # a matrix product in the fused UNet
            linears.add((x.shape[-1] * x.shape[-2], module.in_channels, module.out_channels))
        else:
            convolutions.add((module.in_channels, module.out_channels, module.stride[0], x.shape[-1]))

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config)
        side, width = unet.config.sample_size, unet.config.cross_attention_dim
        inputs = torch.randn(1, 4, side, side), torch.ones(1), torch.randn(1, 77, width)
    for module in unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(note)
    with torch.no_grad():
        unet(*inputs)
    return convolutions, linears


def attention_case(backend: str, queries: int, keys: int, width: int, place: dict) -> Case:
    """Scaled dot-product attention of 8 heads by one of torch's backends, or by the one that it takes by itself."""

    def attend(q, k, v):
        with contextlib.nullcontext() if backend == "DEFAULT" else sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def make():
        return forward_backward(
            attend, [torch.randn(1, length, 8, width, **place) for length in (queries, keys, keys)]
        )

    return Case(f"attention {backend.lower()}", f"{queries}x{keys}x{width}", make)


def convolution_case(channels_in: int, channels_out: int, stride: int, side: int, place: dict) -> Case:
    """A 3x3 convolution, channels_last: forward, gradients of the image and of the weights."""

    def convolve(x, weight):
        return F.conv2d(x, weight, stride=stride, padding=1)

    def make():
        x = torch.randn(1, side, side, channels_in, **place).permute(0, 3, 1, 2)
        weight = torch.randn(channels_out, 3, 3, channels_in, **place).permute(0, 3, 1, 2)
        return forward_backward(convolve, [x, weight])

    return Case("convolution", f"{channels_in}->{channels_out} {side}x{side} stride {stride}", make)


def linear_case(rows: int, features_in: int, features_out: int, place: dict) -> Case:
    """A matrix product with a bias: forward, gradients of all three."""

    def make():
        shapes = ((1, rows, features_in), (features_out, features_in), (features_out,))
        return forward_backward(F.linear, [torch.randn(shape, **place) for shape in shapes])

    return Case("linear", f"{rows}x{features_in}->{features_out}", make)


def fused_cases(images: tuple, tokens: tuple, place: dict) -> Iterator[Case]:
    """Our own kernels of the UNet, with every option that changes what they compute."""
    groups = 32 if images == IMAGES else 8

    def image(channels: int, side: int) -> torch.Tensor:
        return torch.randn(1, side, side, channels, **place).permute(0, 3, 1, 2)

    def norm(x, weight, bias, shift, shift_bias):
        return operations.group_norm(x, weight, bias, groups, 1e-5, True, shift, shift_bias, fork=True)

    def add_norm(x, residual, x_bias, weight, bias):
        return operations.add_layer_norm(x, weight, bias, 1e-5, residual, x_bias)

    for channels, side in images:
        parameters = [torch.randn(shape, **place) for shape in ((channels,), (channels,), (1, channels), (channels,))]
        for kind, function, inputs in (
            ("group_norm", norm, lambda c=channels, s=side, p=parameters: [image(c, s), *p]),
            ("add_bias_residual", operations.add_bias_residual, lambda c=channels, s=side, p=parameters: [
                image(c, s), image(c, s), p[0], p[1]]),
        ):  # fmt: skip
            yield Case(kind, f"{channels}x{side}x{side}", lambda f=function, i=inputs: forward_backward(f, i()))
    for rows, features in tokens:

        def make_norm(rows=rows, features=features):
            states = [torch.randn(1, rows, features, **place) for _ in range(2)]
            return forward_backward(add_norm, [*states, *torch.randn(3, features, **place).unbind()])

        def make_geglu(rows=rows, features=features):
            return forward_backward(operations.geglu, [torch.randn(1, rows, 8 * features, **place)])

        yield Case("add_layer_norm", f"{rows}x{features}", make_norm)
        yield Case("geglu", f"{rows}x{8 * features}", make_geglu)


def optimizer_cases(place: dict) -> Iterator[Case]:
    """AdamW and the gradient's norm, over one buffer and over gradients that lie anywhere."""
    count = sum(PARAMETERS)
    scalars = [0.5, 1e-3, 0.9, 0.999, 1e-8, 1e-2, 0.1, 0.03, 1.0, 1.0]

    def make(scattered: bool):
        grads = [torch.randn(numel, **place) for numel in PARAMETERS]
        table = updates.gradient_table(list(PARAMETERS), place["device"]) if scattered else None
        weight, grad = torch.randn(count, **place), torch.cat(grads)
        remainder = None if place["dtype"] == torch.float32 else torch.zeros_like(weight, dtype=torch.int16)
        given = torch.tensor(scalars, device=place["device"])
        if table is not None:
            table.set_addresses(grads)

        def run() -> list[torch.Tensor]:
            masters = [weight.clone(), None if remainder is None else remainder.clone()]
            moments = [torch.zeros(count, device=place["device"]) for _ in range(2)]
            norm = torch.zeros(1, device=place["device"])
            if table is None:
                updates.grad_norm_(grad, norm)
                updates.adamw_(*masters, grad, *moments, given)
            else:
                table.grad_norm_(grads[0].dtype, norm)
                table.adamw_(*masters, *moments, given)
            return [norm, *(part for part in (*masters, *moments) if part is not None)]

        return run

    yield Case("grad_norm_ and adamw_", f"{count} parameters", lambda: make(False))
    if operations.HAS_TRITON and place["device"] == "cuda":
        yield Case("grad_norm_ and adamw_, scattered", f"{count} parameters", lambda: make(True))
