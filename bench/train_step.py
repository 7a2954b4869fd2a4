"""Times the training script on Stable Diffusion v1.4's shape, beside a loop written the usual way.

python -m bench.train_step [--model DIR] [--batch_sizes 1 8] [--steps 60] [--json FILE]

Without --model: random weights of that shape on a GPU, the embedded model on a CPU. Method: the script runs as its
users run it, in its own process; ms a step is the median over its metrics.jsonl after the first 20 steps; the
reference waits for its loss each step, as such loops do, median after 10 steps. Floors: a large copy (bytes read plus
written) and a large fp16 product on random data, measured in the same run. Unknown flags go to the training script.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import script
from bench.command_line import device_name, make_parser, write_results
from bench.random_sd14 import base_folder
from bench.reference_loop import ReferenceLoop
from bench.timing import median_ms

BYTES_PER_PARAMETER = 26  # gradient 2, two moments 8+8, the master's halves 4+4


def time_reference_loop(model: Path, resolution: int, batch_size: int, steps: int, device: str):
    """Its timings, on random pictures; it waits for its loss each step, as such loops do."""
    loop = ReferenceLoop(model, device)
    pixel_values, seconds = torch.rand(batch_size, 3, resolution, resolution) * 2 - 1, []
    for _ in range(steps):
        start = time.perf_counter()
        loop.step(pixel_values)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    median = statistics.median(seconds[min(10, steps // 2) :])
    return dict(batch_size=batch_size, ms_a_step=1e3 * median, images_a_second=batch_size / median, peak_gb=peak)


def floors(device: str) -> dict:
    """Measured copy bandwidth (bytes a second) and fp16 (CPU: fp32) matrix products (FLOP a second)."""
    size, side, dtype = (1 << 30, 8192, torch.float16) if device == "cuda" else (1 << 26, 1024, torch.float32)
    source, target = torch.randn(size // 4, device=device), torch.empty(size // 4, device=device)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    repeats = dict(repeats=20, warm_up=3, on_gpu=device == "cuda")
    copy_ms = median_ms(lambda: target.copy_(source), **repeats)
    product_ms = median_ms(lambda: a @ b, **repeats)
    return dict(copy_bytes_a_second=2e3 * size / copy_ms, product_flop_a_second=2e3 * side**3 / product_ms)


def flop_per_image(model: Path, resolution: int, device: str) -> tuple[float, int]:
    """FLOP of the UNet's forward and backward for one image, and its number of parameters."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model, subfolder="unet"))
        factor = resolution // unet.config.sample_size if resolution % unet.config.sample_size == 0 else 8
        side = resolution // factor
        inputs = torch.randn(1, 4, side, side), torch.ones(1), torch.randn(1, 77, unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter:
        unet(*inputs).sample.sum().backward()
    return counter.get_total_flops(), sum(p.numel() for p in unet.parameters())


def main(argv: list[str] | None = None) -> dict:
    """Runs everything and prints the table; returns the results."""
    parser = make_parser(__doc__, __spec__.name, model=True, photos=True)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="images a step (1 8)")
    parser.add_argument("--steps", type=int, default=60, help="training steps a row (60)")
    parser.add_argument("--no_reference", action="store_true", help="leave the usual loop out")
    args, flags = parser.parse_known_args(argv)
    device, resolution = ("cuda", 512) if torch.cuda.is_available() else ("cpu", 64)
    results = dict(device=device_name(), torch=torch.__version__, floors=floors(device), ours=[], reference=[])
    with tempfile.TemporaryDirectory() as scratch:
        model, output = base_folder(args.model, Path(scratch)), Path(scratch) / "output"
        results["flop_per_image"], results["num_parameters"] = flop_per_image(model, resolution, device)
        for batch_size in args.batch_sizes:
            results["ours"].append(script.train(model, args.photos, output, batch_size, args.steps, flags))
            print_row("ours", results["ours"][-1], results)
        for batch_size in [] if args.no_reference else args.batch_sizes:
            found = time_reference_loop(model, resolution, batch_size, min(args.steps, 40), device)
            results["reference"].append(found)
            print_row("reference", found, results)
    write_results(results, args.json)
    return results


def print_row(name: str, row: dict, results: dict) -> None:
    """One line: times, the floors' share, memory."""
    floor = results["flop_per_image"] * row["batch_size"] / results["floors"]["product_flop_a_second"]
    floor += results["num_parameters"] * BYTES_PER_PARAMETER / results["floors"]["copy_bytes_a_second"]
    mfu = results["flop_per_image"] * row["images_a_second"] / results["floors"]["product_flop_a_second"]
    parts = [
        f"{name:9} batch {row['batch_size']}: {row['ms_a_step']:7.1f} ms/step, {row['images_a_second']:6.1f} images/s"
    ]
    parts += [
        f"floor {1e3 * floor:.1f} ms, {100 * mfu:.0f}% of the measured product rate, peak {row['peak_gb']:.2f} GB"
    ]
    if "first_step" in row:
        parts += [f"first step after {row['first_step']:.1f} s, whole run {row['prompt_back']:.1f} s"]
        parts += [", ".join(f"{name} {seconds:.1f}" for name, seconds in row["seconds_after_start"].items())]
        parts += [f"skipped {row['num_skipped']}", *row["said"]]
    print(", ".join(parts), flush=True)


if __name__ == "__main__":
    main()
