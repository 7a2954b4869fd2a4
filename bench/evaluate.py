"""Times evaluate.py's sampling beside the recipe's loop, and compares its pixels with the plain pipeline's.

python -m bench.evaluate [--model DIR] [--batch_sizes 1 4 8] [--steps 50] [--quick] [--json FILE]

Without --model: random weights of Stable Diffusion v1.4's shape on a GPU (512 px, 50 steps), the embedded model on a
CPU (64 px, 4 steps). Guidance 7.5 throughout. Method: the recipe's loop is DiffusionPipeline.from_pretrained in fp32,
one image a call; ours is utils.models.drawing.sample in evaluate.py's default precision. Seconds an image are the
median over the calls after the first, host work included, PNGs not; the first call, with compilation and capture,
stands beside it. Pixels are compared with the plain pipeline's in ours' precision, in levels of 255.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.command_line import PROMPT, device_name, make_parser, write_results
from bench.random_sd14 import base_folder
from utils.models import drawing, loading
from utils.models.captured_unet import CapturedUNet
from utils.models.drawing import image_size
from utils.models.folder import read_base
from utils.runtime import gpu

GUIDANCE = 7.5
DEVICE = gpu.pick_device()
IS_GPU = DEVICE.type == "cuda"


def synchronize() -> None:
    if IS_GPU:
        torch.cuda.synchronize()


def timed(function) -> tuple[float, object]:
    """Seconds of a call, the GPU's work included, and its result."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def row(name: str, batch_size: int, calls: list[float]) -> dict:
    """Times of calls that make batch_size images each; the first one stands apart."""
    peak = torch.cuda.max_memory_allocated() / 1e9 if IS_GPU else 0.0
    return dict(
        name=name,
        batch_size=batch_size,
        seconds_an_image=statistics.median(calls[1:]) / batch_size,
        first_call_seconds=calls[0],
        peak_gb=peak,
    )


def reset_memory() -> None:
    if IS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def recipe_loop(model: Path, num_images: int, steps: int) -> dict:
    """The recipe's sampling, timed."""
    from utils.runtime.libraries import quiet_libraries

    from diffusers import DiffusionPipeline

    with quiet_libraries():
        pipeline = DiffusionPipeline.from_pretrained(model, local_files_only=True).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    reset_memory()
    calls = []
    for _ in range(num_images):
        seconds, _ = timed(lambda: pipeline(PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE).images[0])
        calls.append(seconds)
    return row("recipe's loop, fp32", 1, calls)


def our_row(pipeline, batch_size: int, num_calls: int, steps: int, say) -> dict:
    """evaluate.py's own sampling at a batch size, with graphs of its own."""
    reset_memory()
    captured = CapturedUNet(say) if IS_GPU else None
    embeddings = drawing.PromptEmbeddings(None, GUIDANCE)
    options = dict(num_inference_steps=steps, guidance_scale=GUIDANCE, embeddings=embeddings, captured=captured)
    calls = []
    for call in range(num_calls + 1):
        seeds = list(range(call * batch_size, (call + 1) * batch_size))
        calls.append(timed(partial(drawing.sample, pipeline, PROMPT, seeds, **options))[0])
    return row("evaluate.py's sampling", batch_size, calls)


def largest_difference(pipeline, num_images: int, steps: int, say) -> int:
    """Of the graphs' pixels from the plain pipeline's."""
    options = dict(num_inference_steps=steps, guidance_scale=GUIDANCE)
    plain, ours = (
        np.stack(drawing.sample(pipeline, PROMPT, list(range(num_images)), captured=captured, **options)).astype(int)
        for captured in (None, CapturedUNet(say) if IS_GPU else None)
    )
    return int(np.abs(ours - plain).max())


def unet_call_ms(pipeline, batch_size: int, say) -> float:
    """Milliseconds of one call of the UNet by graph: with guidance, so of 2 x batch_size rows."""
    height, width = image_size(pipeline)
    factor = pipeline.vae_scale_factor
    shape = (2 * batch_size, pipeline.unet.config.in_channels, height // factor, width // factor)
    options = dict(device=DEVICE, dtype=pipeline.unet.dtype)
    with torch.inference_mode(), CapturedUNet(say).serving(pipeline):
        sample = torch.randn(shape, **options)
        hidden = torch.randn(2 * batch_size, 77, pipeline.unet.config.cross_attention_dim, **options)
        calls = [
            timed(lambda: pipeline.unet(sample, torch.tensor(500), hidden, return_dict=False))[0] for _ in range(8)
        ]
    return 1e3 * statistics.median(calls[1:])


def print_row(entry: dict, recipe: dict) -> None:
    print(
        f"{entry['name']:24} batch {entry['batch_size']}: {entry['seconds_an_image']:.3f} s an image, "
        f"{recipe['seconds_an_image'] / entry['seconds_an_image']:.2f} times as fast as the recipe's; "
        f"first call {entry['first_call_seconds']:.1f} s, peak {entry['peak_gb']:.2f} GB",
        flush=True,
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, __spec__.name, model=True)
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[1, 4, 8] if IS_GPU else [1, 2],
        help="images at a time (on a GPU 1 4 8, on a CPU 1 2)",
    )
    parser.add_argument(
        "--steps", type=int, default=50 if IS_GPU else 4, help="denoising steps an image (on a GPU 50, on a CPU 4)"
    )
    parser.add_argument("--quick", action="store_true", help="2 images of the recipe's loop, 2 timed calls of ours")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Runs everything and prints the table; returns the results."""
    args = parse_args(argv)
    warnings: list[str] = []
    results = dict(device=device_name(), versions=drawing.versions(), steps=args.steps, warnings=warnings)
    print(results["device"], results["versions"], flush=True)
    num_calls, largest = (2 if args.quick else 5), max(args.batch_sizes)
    with tempfile.TemporaryDirectory() as folder:
        model = base_folder(args.model, Path(folder))
        recipe = recipe_loop(model, num_calls if args.quick else num_calls + 1, args.steps)
        print_row(recipe, recipe)
        pipeline = loading.load_pipeline(read_base(model), torch.float16 if IS_GPU else torch.float32, DEVICE)
        results["rows"] = [recipe]
        for batch_size in args.batch_sizes:
            results["rows"].append(our_row(pipeline, batch_size, num_calls, args.steps, warnings.append))
            print_row(results["rows"][-1], recipe)
        results["largest_difference"] = largest_difference(pipeline, largest, args.steps, warnings.append)
        results["unet_call_ms"] = unet_call_ms(pipeline, largest, warnings.append) if IS_GPU else None
    for name in ("largest_difference", "unet_call_ms", "warnings"):
        print(f"{name}: {results[name]}")
    write_results(results, args.json)
    return results


if __name__ == "__main__":
    main()
