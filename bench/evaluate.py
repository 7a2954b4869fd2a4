"""Times evaluate.py's sampling beside the recipe's loop, and checks that both draw the same.

python -m bench.evaluate [--model DIR] [--batch_sizes 1 4 8] [--steps 50] [--quick] [--json FILE]

Without --model: random weights of Stable Diffusion v1.4's shape on a GPU (512 px, 50 steps), the embedded model on a
CPU (64 px, 4 steps). Guidance 7.5 throughout. Method: the recipe's loop is DiffusionPipeline.from_pretrained in fp32,
one image a call; ours is utils.models.drawing.sample in evaluate.py's default precision. Seconds an image are the
median over the calls after the first, host work included, PNGs not; the first call, with compilation and capture,
stands beside it. Differences are of final latents, relative to the second's norm, and of pixels in levels of 255.
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
from utils.models.drawing import draw, image_size
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
    seconds = statistics.median(calls[1:]) / batch_size
    peak = torch.cuda.max_memory_allocated() / 1e9 if IS_GPU else 0.0
    return dict(
        name=name,
        batch_size=batch_size,
        seconds_an_image=seconds,
        images_a_second=1 / seconds,
        first_call_seconds=calls[0],
        peak_gb=peak,
    )


def reset_memory() -> None:
    if IS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def latents_of(pipeline, seeds: list[int], steps: int, captured: CapturedUNet | None = None) -> torch.Tensor:
    """Final latents [N,C,h,w], float32."""
    height, width = image_size(pipeline)
    embeddings = drawing.PromptEmbeddings(None, GUIDANCE)
    with torch.inference_mode():
        prompt_embeds, negative_prompt_embeds = embeddings(pipeline, PROMPT)
        options = dict(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)
        options |= dict(num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="latent")
        if captured is None:
            return draw(pipeline, seeds, height=height, width=width, **options).float()
        with captured.serving(pipeline):
            return draw(pipeline, seeds, height=height, width=width, **options).float()


def recipe_loop(model: Path, num_images: int, steps: int, seeds: list[int]) -> tuple[dict, torch.Tensor]:
    """The recipe's sampling, timed; and its final latents of `seeds`."""
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
    return row("recipe's loop, fp32", 1, calls), torch.cat([latents_of(pipeline, [seed], steps) for seed in seeds])


def our_rows(pipeline, batch_sizes: list[int], num_calls: int, steps: int, say) -> list[dict]:
    """evaluate.py's own sampling, at each batch size with graphs of its own."""
    rows = []
    for batch_size in batch_sizes:
        reset_memory()
        captured = CapturedUNet(say) if IS_GPU else None
        embeddings = drawing.PromptEmbeddings(None, GUIDANCE)
        options = dict(num_inference_steps=steps, guidance_scale=GUIDANCE, embeddings=embeddings, captured=captured)
        calls = []
        for call in range(num_calls + 1):
            seeds = list(range(call * batch_size, (call + 1) * batch_size))
            calls.append(timed(partial(drawing.sample, pipeline, PROMPT, seeds, **options))[0])
        rows.append(row("evaluate.py's sampling", batch_size, calls))
        print_row(rows[-1])
    return rows


def relative(latents: torch.Tensor, others: torch.Tensor) -> float:
    return ((latents - others).norm() / others.norm()).item()


def differences(pipeline, fp32_latents: torch.Tensor, num_images: int, steps: int, say) -> dict[str, float]:
    """How far the graphs' images are from the plain pipeline's, beside how far rounding takes plain ones apart."""
    seeds, few = list(range(num_images)), len(fp32_latents)
    captured = CapturedUNet(say) if IS_GPU else None
    plain, ours = (latents_of(pipeline, seeds, steps, c) for c in (None, captured))
    options = dict(num_inference_steps=steps, guidance_scale=GUIDANCE)
    pixels = [
        np.stack([np.asarray(image, int) for image in drawing.sample(pipeline, PROMPT, seeds, captured=c, **options)])
        for c in (None, captured)
    ]
    found = {
        "latents, graphs to plain": relative(ours, plain),
        "latents, plain one by one to plain at once": relative(latents_of(pipeline, seeds[:1], steps), plain[:1]),
        "latents, plain to fp32": relative(plain[:few], fp32_latents),
        "latents, graphs to fp32": relative(ours[:few], fp32_latents),
        "pixels, graphs to plain, largest": float(np.abs(pixels[0] - pixels[1]).max()),
        "pixels, graphs to plain, mean": float(np.abs(pixels[0] - pixels[1]).mean()),
    }
    return found


def parts(pipeline, batch_size: int, say) -> dict[str, float]:
    """Milliseconds of one UNet call by graph (with guidance, so 2 x batch_size rows) and of decoding one image."""
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
        decodes = [timed(lambda: pipeline.vae.decode(sample[:batch_size], return_dict=False))[0] for _ in range(4)]
    return {
        "UNet call, ms": 1e3 * statistics.median(calls[1:]),
        "decoding an image, ms": 1e3 * statistics.median(decodes[1:]) / batch_size,
    }


def print_row(entry: dict) -> None:
    ratio = f", {entry['ratio']:.2f} times the recipe's" if "ratio" in entry else ""
    print(
        f"{entry['name']:24} batch {entry['batch_size']}: {entry['seconds_an_image']:.3f} s an image, "
        f"{entry['images_a_second']:.2f} images/s{ratio}; first call {entry['first_call_seconds']:.1f} s, "
        f"peak {entry['peak_gb']:.2f} GB",
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
        seeds = list(range(1 if args.quick else 2))
        recipe, fp32_latents = recipe_loop(model, num_calls if args.quick else num_calls + 1, args.steps, seeds)
        print_row(recipe)
        pipeline = loading.load_pipeline(read_base(model), torch.float16 if IS_GPU else torch.float32, DEVICE)
        ours = our_rows(pipeline, args.batch_sizes, num_calls, args.steps, warnings.append)
        for entry in (recipe, *ours):
            entry["ratio"] = recipe["seconds_an_image"] / entry["seconds_an_image"]
        results |= dict(rows=[recipe, *ours])
        results["differences"] = differences(pipeline, fp32_latents, largest, args.steps, warnings.append)
        results["parts"] = parts(pipeline, largest, warnings.append) if IS_GPU else {}
    print_results(results)
    write_results(results, args.json)
    return results


def print_results(results: dict) -> None:
    print()
    for entry in results["rows"]:
        print_row(entry)
    for name, value in (results["differences"] | results["parts"]).items():
        print(f"{name}: {value:.4g}")
    for warning in results["warnings"]:
        print(f"warning: {warning}")


if __name__ == "__main__":
    main()
