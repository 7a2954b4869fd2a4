"""Times the UNet's forward + backward with and without the fused operations, and the update, on one GPU.

python -m bench.kernels [unet] [optimizer]

Device times by events around replays of CUDA graphs, medians, random data. The UNet has Stable Diffusion v1.4's shape
and random weights in one flat buffer, fp16, channels_last, 64x64 latents.
"""

import time

import torch
import torch.nn.functional as F

from bench.command_line import make_parser
from bench.random_sd14 import UNET_CONFIG
from bench.timing import kernels_of, median_ms
from utils.kernels import operations
from utils.models import fused_unet

START = time.time()
NUM_PARAMETERS = 859_520_964
TOP = 25


def say(*words):
    print(f"[{time.time() - START:4.0f} s]", *words, flush=True)


def capture(function):
    """A CUDA graph of function(), after two eager runs on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def optimizer():
    """AdamW and gradient norm over all parameters."""
    n = NUM_PARAMETERS
    source, target = torch.zeros(2, n, device="cuda")
    ms = median_ms(lambda: target.copy_(source))
    say(f"copy of {n * 4 / 1e9:.1f} GB: {ms:.2f} ms, {n * 8 / ms / 1e6:.0f} GB/s")
    weight = torch.randn(n, device="cuda", dtype=torch.float16)
    remainder = torch.zeros(n, device="cuda", dtype=torch.int16)
    grads = list(torch.randn_like(weight).split(1 << 20))
    table = operations.gradient_table([grad.numel() for grad in grads], torch.float16, "cuda")
    table.set_addresses(grads)
    scalars = torch.tensor([1.0, 1e-6, 0.9, 0.999, 1e-8, 1e-2, 0.1, 0.0316, 1.0, 1.0], device="cuda")
    ms = median_ms(lambda: table.adamw_(weight, remainder, source, target, scalars))
    say(f"adamw_: {ms:.2f} ms, {26 * n / ms / 1e6:.0f} GB/s")
    out = torch.zeros(1, device="cuda")
    ms = median_ms(lambda: table.grad_norm_(out))
    say(f"grad_norm_: {ms:.2f} ms, {2 * n / ms / 1e6:.0f} GB/s")


def flat_unet():
    """The UNet in training mode with its parameters as views into one buffer."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**UNET_CONFIG).half().train()
    point_into(torch.empty(unet.num_parameters(), device="cuda", dtype=torch.float16), unet, "data")
    return unet


def point_into(buffer, unet, attribute):
    """Makes every parameter's `data` (keeping its values) or `grad` a channels_last view into the buffer."""
    parameters = list(unet.parameters())
    for parameter, flat in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        n, *shape = parameter.shape
        view = (
            flat.view(n, *shape[1:], shape[0]).permute(0, 3, 1, 2)
            if parameter.dim() == 4
            else flat.view(parameter.shape)
        )
        if attribute == "data":
            view.copy_(parameter.data)
        setattr(parameter, attribute, view)


def unet_case(unet, batch, name, preallocates, profiles):
    """Time, kernels and, if asked, the longest of them, of a captured forward + backward; returns the gradient."""
    torch.manual_seed(1)
    sample = torch.randn(batch, 4, 64, 64, device="cuda", dtype=torch.float16).contiguous(
        memory_format=torch.channels_last
    )
    timesteps = torch.randint(0, 1000, (batch,), device="cuda")
    prompt = torch.randn(batch, 77, 768, device="cuda", dtype=torch.float16)
    noise = torch.randn(batch, 4, 64, 64, device="cuda")
    grad = torch.zeros(unet.num_parameters(), device="cuda", dtype=torch.float16) if preallocates else None
    if preallocates:
        point_into(grad, unet, "grad")

    def forward_backward():
        if not preallocates:
            unet.zero_grad(set_to_none=True)
        loss = F.mse_loss(unet(sample, timesteps, prompt, return_dict=False)[0].float(), noise)
        (loss * 1024).backward()

    begin = time.time()
    graph = capture(forward_backward)
    torch.cuda.synchronize()
    begin = time.time() - begin
    ms = median_ms(graph.replay, 20)
    totals = kernels_of(graph.replay)
    count, busy = sum(c for _, c in totals.values()), sum(t for t, _ in totals.values()) / 1e3
    kind = "preallocated" if preallocates else "made anew"
    peak = torch.cuda.max_memory_allocated() >> 20
    say(f"UNet {name}, batch {batch}, gradients {kind}: {ms:.2f} ms; {count} kernels, {busy:.2f} ms in all; peak "
        f"{peak} MB; first runs and capture {begin:.0f} s")  # fmt: skip
    if profiles:
        for kernel, (us, calls) in sorted(totals.items(), key=lambda item: -item[1][0])[:TOP]:
            print(f"    {us / 1e3:7.3f} ms {calls:5d}x  {kernel[:150]}")
    if preallocates:
        grad.zero_()
        graph.replay()
    del graph
    torch.cuda.reset_peak_memory_stats()
    return grad


def unet():
    model = flat_unet()
    plain = unet_case(model, 1, "plain", True, True)
    again = unet_case(model, 1, "plain", False, False)
    fused_unet.install(model)
    fused = unet_case(model, 1, "fused", True, False)
    difference = ((fused.float() - plain.float()).norm() / plain.float().norm()).item()
    say(f"fused: the gradient differs by {difference:.1e} of its norm {plain.float().norm().item():.3g}")
    del plain, fused, again
    unet_case(model, 1, "fused", False, True)
    unet_case(model, 8, "fused", True, True)
    unet_case(model, 8, "fused", False, False)
    fused_unet.uninstall(model)
    unet_case(model, 8, "plain", True, False)


def main(argv: list[str] | None = None) -> None:
    """Runs the sections that are named, or all."""
    sections = dict(unet=unet, optimizer=optimizer)
    parser = make_parser(__doc__, __spec__.name, results=False)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(sections))
    chosen = parser.parse_args(argv).sections or list(sections)
    if unknown := set(chosen) - set(sections):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for section in chosen:
        sections[section]()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
