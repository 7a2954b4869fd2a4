"""Times the training script on Stable Diffusion v1.4's shape, beside a loop written the usual way.

python -m bench.train_step [--model DIR] [--batch_sizes 1 8] [--steps 60] [--long_run 400] [--json FILE]

Without --model: random weights of that shape on a GPU, the embedded model on a CPU. Method: the script runs as its
users run it, in its own process; ms a step is the median over its metrics.jsonl after the first 20 steps; the
reference waits for its loss each step, as such loops do, median after 10 steps. Floors: a large copy (bytes read plus
written) and a large fp16 product on random data, measured in the same run. Unknown flags go to the training script.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.command_line import make_parser, torchrun
from bench.reference_loop import ReferenceLoop
from bench.start import timed
from bench.timing import median_ms

ROOT = Path(__file__).resolve().parent.parent

WARM_UP = 20
BYTES_PER_PARAMETER = 26  # gradient 2, two moments 8+8, the master's halves 4+4


def run_script(
    model: Path,
    photos: Path,
    output: Path,
    resolution: int,
    batch_size: int,
    steps: int,
    flags: list[str],
    num_ranks: int = 1,
):
    """One run of the training script, by torchrun where it has several ranks; returns its timings."""
    launcher = torchrun(num_ranks) if num_ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train_dreambooth_colossalai.py")]
    command += [f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={photos}", f"--output_dir={output}"]
    command += ["--instance_prompt=a photo of my cat.", f"--resolution={resolution}", f"--max_train_steps={steps}"]
    command += [f"--train_batch_size={batch_size}", "--learning_rate=1e-6", "--lr_scheduler=constant", *flags]
    metrics, log = output / "metrics.jsonl", output.parent / "log.txt"
    metrics.unlink(missing_ok=True)
    found = timed(command, lambda _: metrics.exists() and metrics.stat().st_size > 0, log, {})
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    result = json.loads((output / "run.json").read_text())["result"]
    median = statistics.median(row["step_time"] for row in rows[min(WARM_UP, len(rows) // 2) :])
    return dict(
        batch_size=batch_size,
        flags=flags,
        ms_a_step=1e3 * median,
        images_a_second=num_ranks * batch_size / median,
        first_step_seconds=found["first_step"],
        whole_run_seconds=found["prompt_back"],
        peak_gb=(result["peak_memory_bytes"] or 0) / 1e9,
        seconds_after_start=result["seconds_after_start"],
        num_skipped=result["num_skipped"],
        losses=[row["loss"] for row in rows],
        said=[line for line in log.read_text().splitlines() if "captured" in line],
    )


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
    parser = make_parser(__doc__, __spec__.name)
    parser.add_argument(
        "--model",
        type=Path,
        help="a pipeline folder (GPU: random weights of Stable Diffusion v1.4's shape; CPU: the embedded model)",
    )
    parser.add_argument("--photos", type=Path, default=ROOT / "instance", help="folder of photos (instance)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="images a step (1 8)")
    parser.add_argument("--steps", type=int, default=60, help="training steps a row (60)")
    parser.add_argument("--long_run", type=int, default=0, help="steps of one more batch-1 run, timed as a whole")
    parser.add_argument("--no_reference", action="store_true", help="leave the usual loop out")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    args, flags = parser.parse_known_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = dict(torch=torch.__version__, floors=floors(device), ours=[], reference=[])
    results["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or (make_model(Path(scratch)) if device == "cuda" else ROOT / "model/tiny-stable-diffusion")
        resolution = 512 if device == "cuda" else 64
        results["flop_per_image"], results["num_parameters"] = flop_per_image(model, resolution, device)
        runs = [(batch_size, args.steps) for batch_size in args.batch_sizes]
        runs += [(args.batch_sizes[0], args.long_run)] if args.long_run else []
        for batch_size, steps in runs:
            output = Path(scratch) / "output"
            results["ours"].append(run_script(model, args.photos, output, resolution, batch_size, steps, flags))
            print_row("ours", results["ours"][-1], results)
        for batch_size in [] if args.no_reference else args.batch_sizes:
            results["reference"].append(
                time_reference_loop(model, resolution, batch_size, min(args.steps, 40), device)
            )
            print_row("reference", results["reference"][-1], results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return results


def make_model(folder: Path) -> Path:
    """Random weights of Stable Diffusion v1.4's shape."""
    from bench.random_sd14 import write_pipeline

    write_pipeline(folder / "sd14", "cuda")
    return folder / "sd14"


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
    if "first_step_seconds" in row:
        parts += [f"first step after {row['first_step_seconds']:.1f} s, whole run {row['whole_run_seconds']:.1f} s"]
        parts += [", ".join(f"{name} {seconds:.1f}" for name, seconds in row["seconds_after_start"].items())]
        parts += [f"skipped {row['num_skipped']}", *row["said"]]
    print(", ".join(parts), flush=True)


if __name__ == "__main__":
    main()
