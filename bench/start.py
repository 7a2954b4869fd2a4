"""Times what a user waits for, command by command: from the command typed to the first step, the result, the prompt.

python -m bench.start [--model DIR] [--peer train_dreambooth.py] [--parts PART ...] [--json FILE]

Without --model: random weights of Stable Diffusion v1.4's shape on a GPU (512 px, fp16), the embedded model on a CPU.
Every command is a process of its own, started as its users start it (torchrun; the peer, diffusers' DreamBooth
script, by python), on the photos alone of --photos, and finds the libraries' bytecode, as pip leaves it. Parts:
`cold` has an empty cache of Triton's kernels; `warm` is the same again, --repeats times, medians; `evaluate` is
evaluate.py, whole, for 16 + 16 images; `run_sh` is `bash run.sh` on the embedded model without a GPU, in this
environment; `peer` needs --peer. "first step" is its line in metrics.jsonl, or the peer's progress bar at 1. The
marks are seconds after the worker's start, from run.json and samples.json. --json adds to what the file holds, so
that parts can be measured one by one.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import script
from bench.command_line import EMBEDDED, ROOT, make_parser, write_results
from bench.random_sd14 import base_folder
from utils.dataset import find_photos

PARTS = ("cold", "warm", "evaluate", "run_sh", "peer")


def time_peer(peer: Path, flags: list[str], output: Path, steps: int) -> dict[str, Any]:
    """One run of the peer's script, by python."""
    shutil.rmtree(output, ignore_errors=True)
    bar = re.compile(rf"\b[1-9]\d*/{steps}\b")
    return script.timed(
        [sys.executable, str(peer), *flags], lambda said: bool(bar.search(said)), script.log_of(output)
    )


def run_sh(scratch: Path) -> dict[str, Any]:
    """README's own command on the embedded model, without a GPU, in this environment."""
    folders = dict(OUTPUT_DIR=str(scratch / "run.sh-output"), RESULT_DIR=str(scratch / "run.sh-result"))
    env = dict(VENV=sys.prefix, MODEL_NAME=str(EMBEDDED), CUDA_VISIBLE_DEVICES="", **folders)
    found = script.timed(["bash", str(ROOT / "run.sh")], lambda said: False, scratch / "run.sh.log", **env)
    return dict(prompt_back=found["prompt_back"])


def median_run(run: Callable[[], dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Of `repeats` runs the one whose prompt came back in the middle, with the median of each of their times."""
    runs = sorted((run() for _ in range(repeats)), key=lambda run: run["prompt_back"])
    middle = runs[repeats // 2]
    times = [name for name, value in middle.items() if isinstance(value, float)]
    return middle | {name: statistics.median(run[name] for run in runs) for name in times} | dict(num_runs=repeats)


def measure(args: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any]:
    """The wanted parts that need a training, in an order in which each finds what it needs."""
    on_gpu, photos, output, found = torch.cuda.is_available(), scratch / "photos", scratch / "output", {}
    copy_photos(args.photos, photos)

    def run(steps: int, kernels: str = "kernels") -> dict[str, Any]:
        cache = dict(TRITON_CACHE_DIR=str(scratch / kernels))
        return script.train(model, photos, output, 1, steps, [], 1, **cache)

    if "cold" in args.parts:
        run(2, "kernels of a run that fills caches")
        found["cold"] = report("cold", run(args.steps))
    if "warm" in args.parts:
        if "cold" not in args.parts:
            run(2)
        found["warm"] = report("warm", median_run(lambda: run(args.steps), args.repeats))
    if "evaluate" in args.parts:
        if not output.exists():
            run(2)
        num_images, steps = (16, 50) if on_gpu else (2, 4)
        for _ in range(2 if on_gpu else 1):  # the first compiles kernels
            cache = dict(TRITON_CACHE_DIR=str(scratch / "kernels"))
            result = script.evaluate(model, output, photos, scratch / "result", num_images, steps, **cache)
            found["evaluate"] = report("evaluate", result)
    return found


def measure_others(args: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any]:
    """The wanted parts that need no training of ours; the photos are in the scratch folder."""
    found = {}
    if "run_sh" in args.parts:
        found["run_sh"] = report("run_sh", median_run(lambda: run_sh(scratch), args.repeats))
    if "peer" in args.parts and args.peer:
        output = scratch / "peer"

        def run(steps: int) -> dict[str, Any]:
            return time_peer(args.peer, script.recipe(model, scratch / "photos", output, 1, steps), output, steps)

        run(2)  # its libraries' bytecode, and the page cache
        found["peer"] = report("peer", median_run(lambda: run(args.steps), args.repeats))
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
    for path in find_photos(source)[0]:
        shutil.copy(path, target)


def machine() -> dict[str, Any]:
    """What the times are of."""
    num_gpus = torch.cuda.device_count()
    name = torch.cuda.get_device_name() if num_gpus else platform.machine()
    versions = dict(torch=torch.__version__, date=time.strftime("%F"))
    return dict(device=name, num_gpus=num_gpus, cores=os.cpu_count(), **versions)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "bench.start", model=True, photos=True)
    parser.add_argument("--peer", type=Path, help="diffusers' train_dreambooth.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="these alone")
    parser.add_argument("--steps", type=int, default=400, help="of a run")
    parser.add_argument("--no_bytecode", action="store_true", help="the machine's own way with Python's bytecode")
    parser.add_argument("--repeats", type=int, default=1, help="runs of warm, of run_sh and of the peer")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes; returns all results."""
    args = parse_args(argv)
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    results |= machine()
    print({name: results[name] for name in ("device", "cores", "torch", "date")}, flush=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = base_folder(args.model, scratch)
        if sys.dont_write_bytecode and not args.no_bytecode:  # this machine may have none of the libraries'
            stack.enter_context(mock.patch.dict(os.environ, PYTHONPYCACHEPREFIX=str(scratch / "bytecode")))
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        results |= measure(args, model, scratch) | measure_others(args, model, scratch)
    write_results(results, args.json)
    return results


if __name__ == "__main__":
    main()
