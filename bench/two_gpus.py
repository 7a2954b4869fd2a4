"""Times and losses of the training script on two GPUs against one, beside docs/scaling.md's prediction.

python -m bench.two_gpus --model DIR [--steps 60] [--json FILE]

Method: as bench/train_step.py's; the runs of one total batch draw the same samples, so their losses must agree.
Unknown flags go to the training script.
"""

import tempfile
from pathlib import Path

from bench import script
from bench.command_line import make_parser, write_results
from bench.random_sd14 import base_folder

# (ranks, batch a rank, micro-batches); runs with one product of the three draw the same samples.
RUNS = ((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 8, 1), (2, 8, 1), (2, 1, 4))


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs them one after another and prints a row each; returns the results."""
    parser = make_parser(__doc__, __spec__.name, model=True, photos=True)
    parser.add_argument("--steps", type=int, default=60, help="training steps a row (60)")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(RUNS)), help="numbers of RUNS")
    args, flags = parser.parse_known_args(argv)
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        model, output = base_folder(args.model, Path(scratch)), Path(scratch) / "output"
        for number in args.only:
            ranks, batch, micro = RUNS[number]
            every = [*flags, f"--gradient_accumulation_steps={micro}", "--seed=0"]
            found = script.train(model, args.photos, output, batch, args.steps, every, ranks if ranks > 1 else None)
            results.append(dict(found, num_ranks=ranks, num_micro_batches=micro))
            print(row(results[-1], results), flush=True)
    write_results(results, args.json)
    return results


def row(found: dict, results: list[dict]) -> str:
    """One line; compared with the one-rank run of the same batch a rank, and in losses with one of the same total."""
    batch, micro, ranks = found["batch_size"], found["num_micro_batches"], found["num_ranks"]
    parts = [f"{ranks} GPUs x batch {batch} x {micro}: {found['ms_a_step']:.1f} ms a step"]
    parts += [f"{micro * found['images_a_second']:.1f} images/s, peak {found['peak_gb']:.2f} GB"]
    parts += [f"first step after {found['first_step']:.1f} s", *found["said"]]
    for other in results[:-1]:
        alone = (other["num_ranks"], other["batch_size"], other["num_micro_batches"]) == (1, batch, micro)
        if alone and ranks > 1:
            parts.append(f"{found['ms_a_step'] / other['ms_a_step']:.2f} of the step on one GPU")
        if other["num_ranks"] * other["batch_size"] * other["num_micro_batches"] == ranks * batch * micro:
            pairs = zip(found["losses"], other["losses"], strict=True)
            apart = max(abs(one / two - 1) for one, two in pairs)
            parts.append(
                f"losses differ by at most {apart:.1e} from those of {other['num_ranks']} x {other['batch_size']}"
            )
    return ", ".join(parts)


if __name__ == "__main__":
    main()
