"""Whole runs under the memory of smaller cards, by torch's own limit, on one large card.

python -m bench.memory_tiers [--model DIR] [--only 24 16 12 8 6] [--jobs 3] [--json FILE]

For each size of card, the training script with class images to make, validation pictures and a checkpoint, then
evaluate.py, all inside what such a card leaves: its memory less KEPT_FREE. The limit is torch's
per_process_memory_fraction, so it holds for what torch takes, not for what other programs take beside it. One run with
the default flags on a 12 GB card must end with the one line that says what to do.

Without --model: random weights of Stable Diffusion v1.4's shape. Three runs at a time (--jobs) share the card: memory
is not affected, but times are. Needs 80 GB of GPU memory, 50 GB of disk. Unknown flags go to the training script. 1 if
a run did not end as it should.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.command_line import PROMPT, ROOT, device_name, make_parser, write_results
from bench.memory import GIB
from bench.random_sd14 import base_folder
from utils.training.memory import GB

KEPT_FREE = 1.2e9  # bytes: 0.7 GB for the CUDA context and what libraries load, 0.5 GB for a desktop
LIMIT = "PYTORCH_CUDA_ALLOC_CONF"  # torch 2.9 and newer read PYTORCH_ALLOC_CONF, and this too
STEPS = 20
TIME_LIMIT = 240.0  # seconds of one command
WHOLE_RUN = [
    "--with_prior_preservation",
    "--class_prompt=a photo of a cat.",
    "--num_class_images=4",
    f"--validation_prompt={PROMPT}",
    "--num_validation_images=1",
    "--validation_steps=10",
    "--checkpointing_steps=15",
    f"--max_train_steps={STEPS}",
]
QUICK_EVALUATION = ["--num_images=2", "--num_drift_images=1", "--num_inference_steps=10", "--batch_size=2"]
ADVICE = re.compile(r"error: the GPU's memory is full: .*--use_8bit_adam [\d.]+ GB")


class Tier(NamedTuple):
    """A size of card, the flags for it, and whether such a run fits."""

    card: int  # GiB
    flags: list[str]
    fits: bool = True

    @property
    def limit(self) -> float:
        """Bytes that torch may take."""
        return self.card * GIB - KEPT_FREE


TIERS = [
    Tier(24, ["--train_batch_size=4"]),
    Tier(16, ["--train_batch_size=1"]),
    Tier(12, ["--train_batch_size=1", "--use_8bit_adam"]),
    Tier(12, ["--train_batch_size=1"], fits=False),
    Tier(8, ["--train_batch_size=1", "--use_8bit_adam", "--offload_optimizer=moments", "--gradient_checkpointing"]),
    Tier(6, ["--train_batch_size=1", "--low_memory"]),
]


def under_limit(limit: float) -> dict[str, str]:
    """This process's environment, in which torch takes at most `limit` bytes of the GPU; without one as it is."""
    if not torch.cuda.is_available():
        return dict(os.environ)
    fraction = limit / torch.cuda.get_device_properties(0).total_memory
    return os.environ | {LIMIT: f"per_process_memory_fraction:{fraction:.5f}"}


def call(script: str, arguments: list[str], limit: float) -> tuple[int, str, float]:
    """Exit code, what was printed, seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *arguments]
    options: dict[str, Any] = dict(cwd=ROOT, env=under_limit(limit), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        done = subprocess.run(command, timeout=TIME_LIMIT, text=True, **options)
    except subprocess.TimeoutExpired as error:
        return 124, (error.stdout or b"").decode(errors="replace"), TIME_LIMIT
    return done.returncode, done.stdout, time.perf_counter() - start


def whole_run(tier: Tier, *, model: Path, photos: Path, scratch: Path, more: list[str]) -> dict[str, Any]:
    """Training, then evaluation of what it made, under the tier's limit; what is missing of the result is named."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    models = [f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={photos}"]
    argv = [*models, f"--output_dir={folder / 'output'}", f"--class_data_dir={folder / 'class'}"]
    argv += [f"--instance_prompt={PROMPT}", "--learning_rate=1e-6", *WHOLE_RUN, *tier.flags, *more]
    code, said, seconds = call("train_dreambooth_colossalai.py", argv, tier.limit)
    row = dict(card_gib=tier.card, limit_gb=tier.limit / GB, flags=tier.flags, code=code, seconds=seconds)
    if not tier.fits:
        row["ok"] = code == 1 and ADVICE.search(said) is not None and "Traceback" not in said
    elif code == 0:
        result = json.loads((folder / "output" / "run.json").read_text())["result"]
        row["peak_gb"] = (result["peak_memory_bytes"] or 0) / GB
        argv = [*models, f"--finetuned_model_name_or_path={folder / 'output'}", f"--output_dir={folder / 'result'}"]
        row["evaluation_code"], said, row["evaluation_seconds"] = call(
            "evaluate.py", [*argv, *QUICK_EVALUATION], tier.limit
        )
        row["missing"] = missing(folder)
        row["ok"] = row["evaluation_code"] == 0 and not row["missing"]
    row.setdefault("ok", False)
    row["said"] = said.strip().splitlines()[-1:] if row["ok"] else said.splitlines()[-30:]
    shutil.rmtree(folder)  # a checkpoint and a pipeline are 14 GB
    return row


def missing(folder: Path) -> list[str]:
    """What a whole run should have left in `folder` and has not."""
    wanted = {
        "output/model_index.json": 1,
        "output/checkpoint-15/training_state.safetensors": 1,
        f"output/validation/step-{STEPS:06d}-seed-*.png": 1,
        "class/*.png": 4,
        "result/comparison.png": 1,
        "result/output-*.png": 2,
    }
    return [pattern for pattern, count in wanted.items() if len(list(folder.glob(pattern))) < count]


def as_line(row: dict[str, Any]) -> str:
    """A whole run, in Markdown."""
    peak = f"{row['peak_gb']:.2f}" if "peak_gb" in row else "-"
    evaluated = row.get("evaluation_code", "-")
    cells = [f"{row['card_gib']} GB", f"{row['limit_gb']:.2f}", " ".join(row["flags"]), peak, row["code"], evaluated]
    return f"| {' | '.join(map(str, cells))} | {'as it should' if row['ok'] else 'NOT as it should'} |"


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 if a run did not end as it should."""
    parser = make_parser(__doc__, __spec__.name, model=True, photos=True)
    cards = sorted({tier.card for tier in TIERS})
    parser.add_argument("--only", type=int, nargs="*", choices=cards, default=cards, metavar="GB", help="cards")
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time (3)")
    args, more = parser.parse_known_args(argv)
    results: dict[str, Any] = dict(device=device_name(), torch=torch.__version__, kept_free_gb=KEPT_FREE / GB, runs=[])
    print("| card | limit GB | flags | peak GB | exit code | evaluation's | |\n|" + "---|" * 7, flush=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as executor:
        model = base_folder(args.model, Path(scratch))
        run = functools.partial(whole_run, model=model, photos=args.photos, scratch=Path(scratch), more=more)
        for row in executor.map(run, [tier for tier in TIERS if tier.card in args.only]):
            results["runs"].append(row)
            print(as_line(row), *([] if row["ok"] else row["said"]), sep="\n", flush=True)
            write_results(results, args.json)  # after each, so that a time limit loses only what it interrupts
    return int(not all(row["ok"] for row in results["runs"]))


if __name__ == "__main__":
    sys.exit(main())
