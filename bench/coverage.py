"""How often evaluate.py's 95% intervals hold the true value, by simulation: the table in docs/evaluation.md.

python -m bench.coverage [--trials 20000] [--seed 0]

A value is the sum of what its prompt adds, what its seed adds (all prompts have the same seeds) and what is its own.
Each is normal, with the standard deviations in the table's head (prompt / seed / own). In the last column there are
two kinds of images: one in four is far from the others, as a dog that has become the cat. What an interval should hold
is the mean over all prompts and seeds; with one prompt, over all seeds of that prompt. For DIV, embeddings are normal
around their prompt's, in 32 dimensions. In brackets: half an interval's width, the median. "none": no interval.
"""

import sys
from collections.abc import Callable
from functools import partial

import numpy as np

from bench.command_line import make_parser
from utils.evaluation.metrics import diversity, diversity_interval, mean_interval, pair_distances, unit_rows

LAYOUTS = ((1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (3, 4), (4, 2), (5, 4), (8, 4), (25, 2), (25, 3), (25, 4))
# Standard deviations of what the prompt, the seed and the image itself add.
COMPONENTS = ((0.0, 0.0, 1.0), (0.3, 0.0, 1.0), (1.0, 0.0, 1.0), (2.0, 0.0, 1.0), (0.5, 0.5, 1.0), (1.0, 0.3, 1.0))
OTHER_KIND, SHARE = 3.0, 0.25  # in standard deviations of an image, and of the images
DIMENSIONS = 32  # of the embeddings for DIV


def draw_values(draws: np.random.Generator, layout: tuple, components: tuple) -> tuple[np.ndarray, float]:
    """([P,K] values, the mean that an interval should hold)."""
    num_prompts, num_seeds = layout
    of_prompt, of_seed, own = components
    prompts = draws.normal(size=(num_prompts, 1)) * of_prompt
    values = prompts + draws.normal(size=(1, num_seeds)) * of_seed + draws.normal(size=layout) * own
    return values, float(prompts[0, 0]) if num_prompts == 1 else 0.0


def draw_two_kinds(draws: np.random.Generator, layout: tuple) -> tuple[np.ndarray, float]:
    """The same of images of two kinds."""
    return draws.normal(size=layout) + OTHER_KIND * (draws.random(layout) < SHARE), OTHER_KIND * SHARE


def coverage(draw: Callable, interval: Callable, trials: int) -> tuple[float, float] | None:
    """(share of intervals that hold the truth, median half width); None without intervals."""
    held, widths = 0, []
    for _ in range(trials):
        values, truth = draw()
        found = interval(values)
        if found is None:
            return None
        held += found[0] <= truth <= found[1]
        widths.append((found[1] - found[0]) / 2)
    return held / trials, float(np.median(widths))


def draw_distances(draws: np.random.Generator, layout: tuple, truth: float) -> tuple[np.ndarray, float]:
    """([P,K,K] distances of images around their prompt's centre, `truth`)."""
    centre = 2 * draws.normal(size=(layout[0], 1, DIMENSIONS))
    images = centre + draws.normal(size=(*layout, DIMENSIONS))
    return pair_distances(unit_rows(images.reshape(-1, DIMENSIONS)).reshape(*layout, DIMENSIONS)), truth


def cell(found: tuple[float, float] | None) -> str:
    return "none" if found is None else f"{found[0]:.3f} ({found[1]:.2f})"


def mean_rows(trials: int, seed: int) -> list[list[str]]:
    """A row a layout: coverage and half width for each of COMPONENTS, and for two kinds of images."""
    rows = []
    for layout in LAYOUTS:
        draws = np.random.default_rng(seed)
        draw = [partial(draw_values, draws, layout, components) for components in COMPONENTS]
        draw.append(partial(draw_two_kinds, draws, layout))
        rows.append([f"{layout[0]} x {layout[1]}", *(cell(coverage(each, mean_interval, trials)) for each in draw)])
    return rows


def diversity_rows(trials: int, seed: int) -> list[list[str]]:
    """A row a layout of several prompts: coverage of DIV's interval."""
    draws = np.random.default_rng(seed)
    many = [diversity(draw_distances(draws, (500, 8), 0.0)[0]) for _ in range(20)]
    draw = {
        layout: partial(draw_distances, draws, layout, float(np.mean(many))) for layout in LAYOUTS if layout[0] > 1
    }
    return [
        [f"{layout[0]} x {layout[1]}", cell(coverage(each, diversity_interval, trials))]
        for layout, each in draw.items()
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Prints both tables."""
    parser = make_parser(__doc__, "bench.coverage", results=False)
    parser.add_argument("--trials", type=int, default=20000, help="intervals a cell (20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (0)")
    args = parser.parse_args(argv)
    names = [" / ".join(f"{value:g}" for value in components) for components in COMPONENTS]
    print(table(["prompts x images", *names, "two kinds"], mean_rows(args.trials, args.seed)), "\n")
    print(table(["prompts x images", "DIV"], diversity_rows(args.trials // 4, args.seed)))


if __name__ == "__main__":
    sys.exit(main())
