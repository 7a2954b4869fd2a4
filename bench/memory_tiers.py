"""Whole runs under the memory of smaller cards, by torch's own limit, on one large card.

python -m bench.memory_tiers [--model DIR] [--only 24 16 12 8 6] [--no_batches] [--jobs 3] [--json FILE]

For each size of card, the training script with class images to make, validation pictures and a checkpoint, then
evaluate.py, all inside what such a card leaves: its memory less KEPT_FREE. The limit is torch's
per_process_memory_fraction, so it holds for what torch takes, not for what other programs take beside it. One run with
the default flags on a 12 GB card must end with the one line that says what to do.

Then, unless --no_batches: one step's memory and time with batches of 1, 2, 4 and 8, with and without gradient
checkpointing, for each way of holding AdamW's state, each under the limit of the smallest card that the preflight's
estimate says it fits.

Without --model: random weights of Stable Diffusion v1.4's shape. Three runs at a time (--jobs) share the card: memory
is not affected, but times are, so the first table has none. Needs 80 GB of GPU memory, 50 GB of disk. 1 if a run did
not end as it should.
"""

import functools
import gc
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.command_line import make_parser
from bench.memory import GIB
from bench.train_step import make_model
from utils.training.memory import GB, MemoryNeeds, memory_needed

ROOT = Path(__file__).resolve().parent.parent
KEPT_FREE = 1.2e9  # bytes: 0.7 GB for the CUDA context and what libraries load, 0.5 GB for a desktop
LIMIT = "PYTORCH_CUDA_ALLOC_CONF"  # torch 2.9 and newer read PYTORCH_ALLOC_CONF, and this too
STEPS = 20
TIME_LIMIT = 240.0  # seconds of one command
WHOLE_RUN = [
    "--with_prior_preservation",
    "--class_prompt=a photo of a cat.",
    "--num_class_images=4",
    "--validation_prompt=a photo of my cat.",
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
STATES: dict[str, dict[str, Any]] = {
    "none": {},
    "--use_8bit_adam": dict(use_8bit_adam=True),
    "--offload_optimizer=all": dict(offload_optimizer="all"),
}
BATCHES = (1, 2, 4, 8)


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
    argv += ["--instance_prompt=a photo of my cat.", "--learning_rate=1e-6", *WHOLE_RUN, *tier.flags, *more]
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


def one_step(optimizer: Any, unet: Any, booster: Any, batch: int) -> tuple[float, list[float]]:
    """Peak bytes that torch held while a captured step of `batch` images ran, and the milliseconds of its replays."""
    from diffusers import DDPMScheduler

    from utils.data.batches import MicroBatch
    from utils.data.inputs import TrainingInputs
    from utils.training.captured_step import WARM_UP_STEPS, CapturedStep
    from utils.training.train_step import TrainStep

    device, config = optimizer.flat.device, unet.unwrap().config
    prompts = torch.randn(1, 77, config.cross_attention_dim, device=device, dtype=optimizer.flat.weight.dtype)
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    inputs = TrainingInputs(prompts, None, None, DDPMScheduler(**schedule), 0.18215)
    shape = (batch, 4, config.sample_size, config.sample_size)
    mean, std, latent_noise, noise = (torch.randn(shape, device=device) for _ in range(4))
    timesteps, rows = torch.full((batch,), 500, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    micro_batch = MicroBatch(mean, std.abs(), latent_noise, noise, timesteps, rows)
    problems: list[str] = []
    step = CapturedStep(TrainStep(unet, optimizer, booster, inputs), problems.append)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WARM_UP_STEPS + 8):
        start = time.perf_counter()
        step([micro_batch])
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    if problems:
        raise torch.cuda.OutOfMemoryError(problems[0])
    return torch.cuda.max_memory_reserved(), times[WARM_UP_STEPS + 2 :]


def limits_for(state: dict[str, Any], batch: int, checkpoints: bool, count: int) -> Iterator[Tier]:
    """The smallest card that the estimate says is large enough, then the larger ones."""
    options = dict(use_8bit_adam=False, offload_optimizer="none") | state
    needs = MemoryNeeds(count, 1, False, batch, False, 512, checkpoints, **options)
    for card in sorted({tier.card for tier in TIERS} | {32, 80}):
        if memory_needed(needs) <= Tier(card, []).limit:
            yield Tier(card, [])


def state_rows(name: str) -> list[dict[str, Any]]:
    """A row for each batch size, with and without gradient checkpointing, for one way of holding AdamW's state."""
    from diffusers import UNet2DConditionModel

    from bench.random_sd14 import UNET_CONFIG
    from utils.models import fused_unet
    from utils.runtime.colossal import boost, launch
    from utils.training.build import enable_gradient_checkpointing
    from utils.training.captured_step import training_stream
    from utils.training.flat_parameters import FlatParameters
    from utils.training.optimizer import MasterWeightsOptimizer

    launch(seed=0)
    device, state, rows = torch.device("cuda"), STATES[name], []
    offload, eight_bit = state.get("offload_optimizer", "none"), state.get("use_8bit_adam", False)
    with training_stream(device):
        with torch.device(device):
            plain = UNet2DConditionModel(**UNET_CONFIG).train()
        options = dict(scattered_grads=not eight_bit, offload_optimizer=offload)
        flat = FlatParameters(plain, torch.float16, device, torch.channels_last, **options)
        fused_unet.install(plain)
        optimizer = MasterWeightsOptimizer(flat, learning_rates=[1e-6], use_8bit_adam=eight_bit)
        unet, optimizer, booster = boost(plain, optimizer)
        for checkpoints in (False, True):
            (enable_gradient_checkpointing if checkpoints else type(plain).disable_gradient_checkpointing)(plain)
            for batch in BATCHES:
                row = dict(flags=name, batch=batch, gradient_checkpointing=checkpoints)
                rows.append(row | under_the_smallest(state, checkpoints, batch, optimizer, unet, booster))
    return rows


def under_the_smallest(state: dict, checkpoints: bool, batch: int, optimizer: Any, unet: Any, booster: Any) -> dict:
    """The smallest card whose limit the step runs under, and what it took; `tried`: smaller ones that were full."""
    tried, total = [], torch.cuda.get_device_properties(0).total_memory
    for tier in limits_for(state, batch, checkpoints, optimizer.flat.masters.numel):
        gc.collect()  # the graph of the row before
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, tier.limit / total))
        try:
            peak, times = one_step(optimizer, unet, booster, batch)
            return dict(card_gib=tier.card, tried=tried, held_gb=peak / GB, ms_a_step=statistics.median(times))
        except torch.cuda.OutOfMemoryError:
            tried.append(tier.card)
            optimizer.zero_grad()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return dict(card_gib=None, tried=tried, held_gb=None, ms_a_step=None)


def as_line(row: dict[str, Any]) -> str:
    """A whole run, in Markdown."""
    peak = f"{row['peak_gb']:.2f}" if "peak_gb" in row else "-"
    evaluated = row.get("evaluation_code", "-")
    cells = [f"{row['card_gib']} GB", f"{row['limit_gb']:.2f}", " ".join(row["flags"]), peak, row["code"], evaluated]
    return f"| {' | '.join(map(str, cells))} | {'as it should' if row['ok'] else 'NOT as it should'} |"


def as_batch_line(row: dict[str, Any]) -> str:
    """A row of the batches' table, in Markdown."""
    held, ms = (f"{row[name]:.2f}" if row[name] else "-" for name in ("held_gb", "ms_a_step"))
    checkpointing = "yes" if row["gradient_checkpointing"] else "no"
    return f"| {row['flags']} | {row['batch']} | {checkpointing} | {held} | {ms} | {row['card_gib']} GB |"


def main(argv: list[str] | None = None) -> int:
    """Prints both tables; 1 if a whole run did not end as it should."""
    parser = make_parser(__doc__, __spec__.name)
    parser.add_argument(
        "--model", type=Path, help="a pipeline folder; else random weights are written to a scratch one"
    )
    parser.add_argument("--photos", type=Path, default=ROOT / "instance", help="folder of photos (instance)")
    cards = sorted({tier.card for tier in TIERS})
    parser.add_argument("--only", type=int, nargs="*", choices=cards, default=cards, metavar="GB", help="cards")
    parser.add_argument("--no_batches", action="store_true", help="leave the table of batch sizes out")
    parser.add_argument("--jobs", type=int, default=3, help="whole runs at a time (3)")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    args, more = parser.parse_known_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = dict(device=device, torch=torch.__version__, kept_free_gb=KEPT_FREE / GB, runs=[])
    print("| card | limit GB | flags | peak GB | exit code | evaluation's | |\n|" + "---|" * 7, flush=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as executor:
        folders = dict(model=args.model or make_model(Path(scratch)), photos=args.photos, scratch=Path(scratch))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        run = functools.partial(whole_run, more=more, **folders)
        for row in executor.map(run, [tier for tier in TIERS if tier.card in args.only]):
            results["runs"].append(row)
            print(as_line(row), *([] if row["ok"] else row["said"]), sep="\n", flush=True)
            write(results, args.json)
    if not args.no_batches:
        print("\n| AdamW's state | batch | checkpointing | held GB | ms a step | card |\n|" + "---|" * 6, flush=True)
        results["batches"] = []
        # A process for each: what one holds would count towards the next one's limit.
        for name in STATES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
                rows = executor.submit(state_rows, name).result()
            results["batches"] += rows
            print(*map(as_batch_line, rows), sep="\n", flush=True)
            write(results, args.json)
    return int(not all(row["ok"] for row in results["runs"]))


def write(results: dict[str, Any], path: Path | None) -> None:
    """To `path`, if there is one: after each run, so that a time limit loses only what it interrupts."""
    if path:
        path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main())
