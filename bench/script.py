"""The training script as its users run it: in a process of its own, timed from outside."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.command_line import PROMPT, ROOT

WARM_UP = 20  # steps that do not count


def timed(command: list[str], first_step: Callable[[str], bool], log: Path, **env: str) -> dict[str, Any]:
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


def log_of(output: Path) -> Path:
    """Where a command's output goes: beside its output folder."""
    return output.with_name(f"{output.name}.log")


def torchrun(num_ranks: int) -> list[str]:
    """What Python runs to start a script on so many ranks."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]


def recipe(model: Path, photos: Path, output: Path, batch_size: int, steps: int) -> list[str]:
    """The recipe's flags, which diffusers' script has too."""
    on_gpu = torch.cuda.is_available()
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


def train(
    model: Path,
    photos: Path,
    output: Path,
    batch_size: int,
    steps: int,
    flags: list[str],
    num_ranks: int | None = None,
    **env: str,
) -> dict[str, Any]:
    """One run anew, by torchrun if `num_ranks` is given; its times, losses and memory.

    ms_a_step is the median over metrics.jsonl after the first WARM_UP steps.
    """
    shutil.rmtree(output, ignore_errors=True)
    launcher, metrics = torchrun(num_ranks) if num_ranks else [], output / "metrics.jsonl"
    command = [sys.executable, *launcher, str(ROOT / "train_dreambooth_colossalai.py")]
    command += [*recipe(model, photos, output, batch_size, steps), *flags]
    found = timed(command, lambda _: metrics.exists() and metrics.stat().st_size > 0, log_of(output), **env)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    result = json.loads((output / "run.json").read_text())["result"]
    marks = result["seconds_after_start"]
    median = statistics.median(row["step_time"] for row in rows[min(WARM_UP, len(rows) // 2) :])
    start_of_worker = found["first_step"] - marks["first step"]
    return found | dict(
        batch_size=batch_size,
        flags=flags,
        ms_a_step=1e3 * median,
        images_a_second=(num_ranks or 1) * batch_size / median,
        start_of_worker=start_of_worker,
        from_the_last_step=found["prompt_back"] - start_of_worker - marks["trained"],
        peak_gb=(result["peak_memory_bytes"] or 0) / 1e9,
        seconds_after_start=marks,
        num_skipped=result["num_skipped"],
        losses=[row["loss"] for row in rows],
        said=[line for line in log_of(output).read_text().splitlines() if "captured" in line],
    )


def evaluate(
    model: Path, finetuned: Path, photos: Path, output: Path, num_images: int, steps: int, **env: str
) -> dict:
    """evaluate.py, all stages, anew: its time, how long an image took, and its marks."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, str(ROOT / "evaluate.py"), f"--pretrained_model_name_or_path={model}"]
    command += [f"--finetuned_model_name_or_path={finetuned}", f"--instance_data_dir={photos}"]
    command += [f"--output_dir={output}", f"--prompt={PROMPT}", f"--num_images={num_images}", "--num_drift_images=0"]
    command += [f"--num_inference_steps={steps}"]
    seconds = timed(command, lambda said: False, log_of(output), **env)["prompt_back"]
    said = re.search(r"(\d+) images in ([\d.]+) s", log_of(output).read_text())
    samples = json.loads((output / "samples.json").read_text())
    return dict(
        prompt_back=seconds,
        num_images=len(samples["images"]),
        seconds_an_image=float(said[2]) / int(said[1]) if said else None,
        seconds_after_start=samples["seconds_after_start"],
    )
