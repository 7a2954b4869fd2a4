"""Times a call of Stable Diffusion v1.4's UNet as sampling makes it, in several ways, on one GPU in about a minute.

python -m bench.studies.unet_call [--rows 16 2] [--json FILE]

Rows are two an image (guidance). Random weights and data, fp16, channels_last, 64x64 latents, device times by events,
median of replays. `difference` is the output's distance from the plain call's, of that output's norm. The last ways
differ from the one before in what they name. At the end the longest kernels of the way that sampling uses.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.command_line import make_parser
from bench.random_sd14 import UNET_CONFIG
from bench.timing import kernels_of, median_ms
from utils.models import captured_unet, fused_unet

REPEATS = 15
TOP = 30
LONG = 1024  # tokens of a long self-attention


def make_unet() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNet2DConditionModel(**UNET_CONFIG).half().eval()
    return unet.to(memory_format=torch.channels_last)


def make_inputs(rows: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    half = dict(device="cuda", dtype=torch.float16)
    latents = torch.randn(rows // 2, 4, 64, 64, **half)
    return torch.cat([latents, latents]), torch.tensor(500), torch.randn(rows, 77, 768, **half)


@contextlib.contextmanager
def attention(backend, shortest: int = 0):
    """Attention by `backend` first, for `shortest` keys and more."""
    plain = F.scaled_dot_product_attention

    def attend(query, key, value, **options):
        if key.shape[-2] < shortest:
            return plain(query, key, value, **options)
        with sdpa_kernel([backend, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
            return plain(query, key, value, **options)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def ways() -> dict[str, tuple[bool, object]]:
    """(whether the kernels are fused, what to capture inside of) by name; the first is the definition."""
    cudnn, benchmark = SDPBackend.CUDNN_ATTENTION, torch.backends.cudnn.flags(enabled=True, benchmark=True)
    return {
        "graph of diffusers' own": (False, contextlib.nullcontext()),
        "fused kernels": (True, contextlib.nullcontext()),
        "fused, equal halves": (True, contextlib.nullcontext()),
        "fused, cuDNN's attention": (True, attention(cudnn)),
        f"fused, cuDNN's attention from {LONG} keys": (True, attention(cudnn, LONG)),
        "fused, memory-efficient attention": (True, attention(SDPBackend.EFFICIENT_ATTENTION)),
        "fused, cudnn.benchmark": (True, benchmark),
    }


def profile(graph) -> None:
    """The longest kernels of one replay."""
    totals = kernels_of(graph.graph.replay)
    busy, count = (sum(values) for values in zip(*totals.values(), strict=True))
    print(f"{count} kernels, {busy / 1e3:.2f} ms in all; the longest:")
    for name, (us, calls) in sorted(totals.items(), key=lambda item: -item[1][0])[:TOP]:
        print(f"    {us / 1e3:7.3f} ms {calls:5d}x  {name[:140]}")


@torch.inference_mode()
def time_rows(unet, rows: int) -> list[dict]:
    """Every way at one number of rows."""
    inputs, found = make_inputs(rows), []
    plain = unet(*inputs).sample.float()
    on_gpu = inputs[0], inputs[1].cuda(), inputs[2]

    def forward(*arguments):
        return unet(*arguments, return_dict=False)

    found.append(dict(rows=rows, way="launched by Python", ms=median_ms(lambda: forward(*on_gpu), REPEATS)))
    for way, (fuses, context) in ways().items():
        if fuses:
            fused_unet.install(unet, equal_halves="halves" in way)
        start = time.perf_counter()
        try:
            with context:
                graph = captured_unet._Graph(forward, inputs, beside=None)
        except RuntimeError as error:
            found.append(dict(rows=rows, way=way, ms=float("nan"), error=str(error).splitlines()[0]))
            continue
        finally:
            fused_unet.uninstall(unet)
        seconds = time.perf_counter() - start
        difference = ((graph(*inputs).float() - plain).norm() / plain.norm()).item()
        found.append(
            dict(
                rows=rows,
                way=way,
                ms=median_ms(graph.graph.replay, REPEATS),
                difference=difference,
                capture_seconds=seconds,
            )
        )
        print(found[-1], flush=True)
        if way == "fused, equal halves":
            profile(graph)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __spec__.name)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 2], help="latents in a call (16 2)")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA GPU")
    print(torch.cuda.get_device_name(), torch.__version__)
    unet = make_unet()
    captured_unet.flatten(list(unet.parameters()))
    found = [entry for rows in args.rows for entry in time_rows(unet, rows)]
    print()
    for entry in found:
        print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in entry.items()))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
