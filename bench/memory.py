"""Peak GPU memory and time a step of the training script with each of the flags that save memory.

python -m bench.memory [--model DIR] [--only default low_memory ...] [--steps 30] [--json FILE]

Without --model: random weights of Stable Diffusion v1.4's shape on a GPU, the embedded model on a CPU. The script runs
as its users run it, in its own process. "peak" is torch's max_memory_allocated; "process" is how much more of the GPU
was in use than before the start, looked at every 20 ms: with the CUDA context and what torch keeps in reserve. Unknown
flags go to the training script.
"""

import contextlib
import tempfile
import threading
from pathlib import Path

import torch

from bench import script
from bench.command_line import device_name, make_parser, write_results
from bench.random_sd14 import base_folder
from utils.arguments import parse_args
from utils.models.check import check_base_model
from utils.run.plan import memory_needs
from utils.training.memory import GB, memory_needed

GIB = 1 << 30
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB
KEPT_FREE = 0.7e9  # bytes: the CUDA context, a desktop
SECONDS_BETWEEN_LOOKS = 0.02
ROWS = {
    "default": (1, []),
    "8bit": (1, ["--use_8bit_adam"]),
    "moments": (1, ["--offload_optimizer=moments"]),
    "all": (1, ["--offload_optimizer=all"]),
    "low_memory": (1, ["--low_memory"]),
    "low_memory_8bit": (1, ["--low_memory", "--use_8bit_adam"]),
    "batch4": (4, []),
    "batch8": (8, []),
    "batch8_checkpointing": (8, ["--gradient_checkpointing"]),
}
HEADER = ("flags", "batch", "peak GB", "process GB", "estimate GB", "ms a step", "smallest card")


@contextlib.contextmanager
def watched_memory(device: str):
    """Yields a list, in the end of one element: bytes in use at the most above those at the start; None on a CPU."""
    found, done = [], threading.Event()
    if device == "cpu":
        yield found
        found.append(None)
        return
    free_before, _ = torch.cuda.mem_get_info()
    least = [free_before]

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            least[0] = min(least[0], torch.cuda.mem_get_info()[0])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(free_before - least[0])


def smallest_card(peak: float, process: float | None) -> str:
    """The smallest of CARDS that holds a run, where `peak` and `process` are bytes."""
    needed = max(peak + KEPT_FREE, process or 0)
    fitting = [card for card in CARDS if needed <= card * GIB]
    return f"{fitting[0]} GB" if fitting else "none"


def measure(model: Path, photos: Path, scratch: Path, name: str, steps: int, flags: list[str], device: str) -> dict:
    """One run of the training script: memory in bytes, ms a step, the preflight's estimate."""
    batch_size, own_flags = ROWS[name]
    flags = [*own_flags, *flags]
    with watched_memory(device) as watched:
        result = script.train(model, photos, scratch / "output", batch_size, steps, flags)
    argv = [*script.recipe(model, photos, scratch / "output", batch_size, steps), *flags]
    count = check_base_model(model).num_parameters
    needs = memory_needs(parse_args(argv), num_parameters=count, num_ranks=1)
    peak = result["peak_gb"] * GB
    return dict(
        name=name,
        flags=" ".join(flags) or "none",
        batch_size=batch_size,
        peak_bytes=peak,
        process_bytes=watched[0],
        estimated_bytes=memory_needed(needs),
        ms_a_step=result["ms_a_step"],
        smallest_card=smallest_card(peak, watched[0]) if device == "cuda" else "-",
        losses=result["losses"],
        said=result["said"],
    )


def as_line(row: dict) -> str:
    """A row of the table, in Markdown."""
    sizes = (row["peak_bytes"], row["process_bytes"], row["estimated_bytes"])
    cells = [row["flags"], row["batch_size"], *(f"{size / GB:.2f}" if size else "-" for size in sizes)]
    cells += [f"{row['ms_a_step']:.1f}", row["smallest_card"], *row["said"]]
    return f"| {' | '.join(map(str, cells))} |"


def main(argv: list[str] | None = None) -> dict:
    """Runs the rows and prints the table; returns the results."""
    parser = make_parser(__doc__, __spec__.name, model=True, photos=True)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=30, help="training steps a row (30)")
    args, flags = parser.parse_known_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = dict(device=device_name(), torch=torch.__version__, steps=args.steps, rows=[])
    print(f"{device_name()}, torch {torch.__version__}, {args.steps} steps a row")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = base_folder(args.model, Path(scratch))
        for row in args.only:
            results["rows"].append(measure(model, args.photos, Path(scratch), row, args.steps, flags, device))
            print(as_line(results["rows"][-1]), flush=True)
            write_results(results, args.json)
    return results


if __name__ == "__main__":
    main()
