"""Times what a user waits for, command by command: from the command typed to the first step, the result, the prompt.

python -m bench.start [--model DIR] [--peer train_dreambooth.py] [--parts PART ...] [--json FILE]

Without --model: random weights of Stable Diffusion v1.4's shape on a GPU (512 px, fp16), the embedded model on a CPU.
Every command is a process of its own, started as its users start it (torchrun; the peer, diffusers' DreamBooth
script, by python), on the photos alone of --photos, and finds the libraries' bytecode, as pip leaves it. Parts:
`cold` has an empty cache of Triton's kernels; `warm` is the same again, --repeats times, medians; `batch8` runs 60
steps; `evaluate` is evaluate.py, whole, for 16 + 16 images; `sampling` is bench.evaluate's, `two_gpus`
bench.two_gpus' (where there are two), `run_sh` is `bash run.sh` on the embedded model without a GPU, in this
environment; `peer` needs --peer. "first step" is its line in metrics.jsonl, or the peer's progress bar at 1. The
marks are seconds after the worker's start, from run.json and samples.json. --json adds to what the file holds, so
that parts can be measured one by one; ratios are printed of whatever it holds then.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from bench.command_line import make_parser, torchrun

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "model/tiny-stable-diffusion"
PARTS = ("cold", "warm", "batch8", "evaluate", "sampling", "two_gpus", "run_sh", "peer")
PROMPT = "a photo of my cat."
PHOTOS = (".jpg", ".jpeg", ".png")
WARM_UP = 20  # steps that do not count


def timed(command: list[str], first_step: Callable[[str], bool], log: Path, env: dict[str, str]) -> dict[str, Any]:
    """Runs a command; seconds until `first_step(what it has printed)`, and until it has ended."""
    start, first = time.perf_counter(), None
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **env})
        while process.poll() is None:
            if first is None and first_step(log.read_text(errors="replace")):
                first = time.perf_counter() - start
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{log.read_text(errors='replace')[-3000:]}")
    return dict(first_step=first, prompt_back=time.perf_counter() - start)


def recipe(model: Path, photos: Path, output: Path, steps: int, batch_size: int, on_gpu: bool) -> list[str]:
    """The recipe's flags: both scripts have them."""
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--instance_data_dir={photos}",
        f"--output_dir={output}",
        f"--instance_prompt={PROMPT}",
        f"--resolution={512 if on_gpu else 64}",
        f"--train_batch_size={batch_size}",
        f"--mixed_precision={'fp16' if on_gpu else 'no'}",
        "--learning_rate=1e-6",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        f"--max_train_steps={steps}",
    ]


def train(flags: list[str], output: Path, batch_size: int, kernels: Path) -> dict[str, Any]:
    """One run of this program by torchrun, with the kernels in the folder `kernels`."""
    shutil.rmtree(output, ignore_errors=True)
    metrics = output / "metrics.jsonl"
    command = [sys.executable, *torchrun(1), str(ROOT / "train_dreambooth_colossalai.py"), *flags]
    env = dict(TRITON_CACHE_DIR=str(kernels))
    found = timed(command, lambda _: metrics.exists() and metrics.stat().st_size > 0, log_of(output), env)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    result = json.loads((output / "run.json").read_text())["result"]
    marks = result["seconds_after_start"]
    step = statistics.median(row["step_time"] for row in rows[min(WARM_UP, len(rows) // 2) :])
    start_of_worker = found["first_step"] - marks["first step"]
    return found | dict(
        ms_a_step=1e3 * step,
        images_a_second=batch_size / step,
        start_of_worker=start_of_worker,
        from_the_last_step=found["prompt_back"] - start_of_worker - marks["trained"],
        kernels=sum(1 for _ in kernels.rglob("*.cubin")),
        peak_gb=(result["peak_memory_bytes"] or 0) / 1e9,
        seconds_after_start=marks,
    )


def log_of(output: Path) -> Path:
    """Where a command's output goes: beside its output folder."""
    return output.with_name(f"{output.name}.log")


def evaluate(
    model: Path, finetuned: Path, photos: Path, output: Path, num_images: int, steps: int, kernels: Path
) -> dict[str, Any]:
    """evaluate.py, all stages, on what was trained, anew."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, str(ROOT / "evaluate.py"), f"--pretrained_model_name_or_path={model}"]
    command += [f"--finetuned_model_name_or_path={finetuned}", f"--instance_data_dir={photos}"]
    command += [f"--output_dir={output}", f"--prompt={PROMPT}", f"--num_images={num_images}", "--num_drift_images=0"]
    command += [f"--num_inference_steps={steps}"]
    found = timed(command, lambda said: False, log_of(output), dict(TRITON_CACHE_DIR=str(kernels)))
    said = re.search(r"(\d+) images in ([\d.]+) s", log_of(output).read_text())
    sampling = float(said[2]) / int(said[1]) if said else None
    samples = json.loads((output / "samples.json").read_text())
    return dict(
        prompt_back=found["prompt_back"],
        num_images=len(samples["images"]),
        seconds_an_image=sampling,
        seconds_after_start=samples["seconds_after_start"],
    )


def time_peer(script: Path, flags: list[str], output: Path, steps: int) -> dict[str, Any]:
    """One run of the peer's script, by python."""
    shutil.rmtree(output, ignore_errors=True)
    bar = re.compile(rf"\b[1-9]\d*/{steps}\b")
    return timed([sys.executable, str(script), *flags], lambda said: bool(bar.search(said)), log_of(output), {})


def run_sh(scratch: Path) -> dict[str, Any]:
    """README's own command on the embedded model, without a GPU, in this environment."""
    folders = dict(OUTPUT_DIR=str(scratch / "run.sh-output"), RESULT_DIR=str(scratch / "run.sh-result"))
    env = dict(VENV=sys.prefix, MODEL_NAME=str(EMBEDDED), CUDA_VISIBLE_DEVICES="", **folders)
    found = timed(["bash", str(ROOT / "run.sh")], lambda said: False, scratch / "run.sh.log", env)
    return dict(prompt_back=found["prompt_back"])


def another_bench(module: str, scratch: Path, *flags: str) -> Any:
    """What another bench writes with --json."""
    written = scratch / f"{module}.json"
    subprocess.run([sys.executable, "-m", module, *flags, f"--json={written}"], cwd=ROOT, check=True)
    return json.loads(written.read_text())


def sampling(model: Path, scratch: Path, on_gpu: bool) -> dict[str, Any]:
    """Seconds an image at batch 8 beside the recipe's loop, and how many times sooner."""
    flags = f"--model={model}", "--batch_sizes", "8" if on_gpu else "2", "--no_command"
    recipe, ours = another_bench("bench.evaluate", scratch, *flags)["rows"]
    seconds = dict(recipe_seconds_an_image=recipe["seconds_an_image"], seconds_an_image=ours["seconds_an_image"])
    return seconds | dict(ratio=ours["ratio"], batch_size=ours["batch_size"])


def two_gpus(model: Path, scratch: Path) -> dict[str, Any]:
    """A step of batch 1 on one GPU and on two, and images a second of two against one."""
    one, two = another_bench("bench.two_gpus", scratch, f"--model={model}", "--only", "0", "2")
    milliseconds = dict(ms_a_step_of_one=one["ms_a_step"], ms_a_step=two["ms_a_step"])
    return milliseconds | dict(ratio=two["images_a_second"] / one["images_a_second"])


def median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run whose prompt came back in the middle of all of them, with the median of each of its times."""
    middle = sorted(runs, key=lambda run: run["prompt_back"])[len(runs) // 2]
    times = [name for name, value in middle.items() if isinstance(value, float)]
    return middle | {name: statistics.median(run[name] for run in runs) for name in times} | dict(num_runs=len(runs))


def measure(args: argparse.Namespace, on_gpu: bool, scratch: Path) -> dict[str, Any]:
    """Those of the wanted parts that need a training, in an order in which each finds what it needs."""
    model, photos, kernels = args.model, scratch / "photos", scratch / "kernels"
    copy_photos(args.photos, photos)
    output, found = scratch / "output", {}

    def run(batch_size: int, steps: int) -> dict[str, Any]:
        return train(recipe(model, photos, output, steps, batch_size, on_gpu), output, batch_size, kernels)

    if "cold" in args.parts:
        train(recipe(model, photos, output, 2, 1, on_gpu), output, 1, scratch / "kernels of a run that fills caches")
        found["cold"] = report("cold", run(1, args.steps))
    if "batch8" in args.parts:
        run(8, 2) if on_gpu else None  # its kernels
        found["batch8"] = report("batch8", run(8, min(60, args.steps)))
    if "warm" in args.parts:
        if "cold" not in args.parts:
            run(1, 2)
        found["warm"] = report("warm", median_run([run(1, args.steps) for _ in range(args.repeats)]))
    if "evaluate" in args.parts:
        if not output.exists():
            run(1, 2)
        num_images, steps = (16, 50) if on_gpu else (2, 4)
        for _ in range(2 if on_gpu else 1):  # the first compiles kernels
            result = evaluate(model, output, photos, scratch / "result", num_images, steps, kernels)
            found["evaluate"] = report("evaluate", result)
    return found


def measure_others(args: argparse.Namespace, num_gpus: int, scratch: Path) -> dict[str, Any]:
    """The other wanted parts; the photos are in the scratch folder."""
    found = {}
    if "sampling" in args.parts:
        found["sampling"] = report("sampling", sampling(args.model, scratch, num_gpus > 0))
    if "two_gpus" in args.parts and num_gpus > 1:
        found["two_gpus"] = report("two_gpus", two_gpus(args.model, scratch))
    if "run_sh" in args.parts:
        found["run_sh"] = report("run_sh", median_run([run_sh(scratch) for _ in range(args.repeats)]))
    if "peer" in args.parts and args.peer:
        output = scratch / "peer"

        def run(steps: int) -> dict[str, Any]:
            flags = recipe(args.model, scratch / "photos", output, steps, 1, num_gpus > 0)
            return time_peer(args.peer, flags, output, steps)

        run(2)  # its libraries' bytecode, and the page cache
        found["peer"] = report("peer", median_run([run(args.steps) for _ in range(args.repeats)]))
    return found


def report(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Prints a part's times, and returns it."""
    times = ", ".join(f"{key} {value:.2f}" for key, value in found.items() if isinstance(value, float))
    marks = ", ".join(f"{mark} {seconds:.1f}" for mark, seconds in found.get("seconds_after_start", {}).items())
    print(f"{name}: {times}" + (f"\n    {marks}" if marks else ""), flush=True)
    return found


def copy_photos(source: Path, target: Path) -> None:
    """The photos alone: the peer's script opens every file of its folder as one."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.suffix.lower() in PHOTOS:
            shutil.copy(path, target)


def print_ratios(results: dict[str, Any]) -> None:
    """The waits beside the peer's, and what else is a ratio, of what was measured."""
    peer = results.get("peer")
    for part in ("warm", "cold"):
        for name in ("first_step", "prompt_back"):
            if peer and part in results:
                ratio = peer[name] / results[part][name]
                print(f"{name}, {part}: {results[part][name]:.1f} s, the peer {peer[name]:.1f} s: {ratio:.2f} times")
    for part, what in (("sampling", "the recipe's images a second"), ("two_gpus", "one GPU's images a second")):
        if part in results:
            print(f"{part}: {results[part]['ratio']:.2f} times {what}")


def machine() -> dict[str, Any]:
    """What the times are of."""
    import torch

    num_gpus = torch.cuda.device_count()
    name = torch.cuda.get_device_name() if num_gpus else platform.machine()
    versions = dict(torch=torch.__version__, date=time.strftime("%F"))
    return dict(device=name, num_gpus=num_gpus, cores=os.cpu_count(), **versions)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "bench.start")
    parser.add_argument("--model", type=Path, help="a pipeline folder; kept between calls it saves writing one")
    parser.add_argument("--photos", type=Path, default=ROOT / "instance", help="what is trained on")
    parser.add_argument("--peer", type=Path, help="diffusers' train_dreambooth.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="these alone")
    parser.add_argument("--steps", type=int, default=400, help="of a run")
    parser.add_argument("--no_bytecode", action="store_true", help="the machine's own way with Python's bytecode")
    parser.add_argument("--repeats", type=int, default=1, help="runs of warm and of the peer")
    parser.add_argument("--json", type=Path, help="adds the numbers to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns all results."""
    args = parse_args(argv)
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    results |= machine()
    num_gpus = results["num_gpus"]
    print({name: results[name] for name in ("device", "cores", "torch", "date")}, flush=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.model is None:
            args.model = scratch / "sd14" if num_gpus else EMBEDDED
        if not args.model.exists():
            from bench.random_sd14 import write_pipeline

            write_pipeline(args.model, "cuda" if num_gpus else "cpu")
        if sys.dont_write_bytecode and not args.no_bytecode:  # this machine may have none of the libraries'
            stack.enter_context(mock.patch.dict(os.environ, PYTHONPYCACHEPREFIX=str(scratch / "bytecode")))
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        results |= measure(args, num_gpus > 0, scratch)
        results |= measure_others(args, num_gpus, scratch)
    print_ratios(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
