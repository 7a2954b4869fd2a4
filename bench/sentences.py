"""Every sentence that evaluate.py can say of numbers: its condition, and how often it is wrong, by simulation.

python -m bench.sentences [--quick] [--json FILE]

Wrong is: the true value lies outside the interval that is printed, the change did not go where it is said to go, or is
larger than it is said to be; a gain that is none; a best that was left out. The worst of all shapes and true values
stands in the table, and how often the sentence is said there. Shapes of a change: normal; skewed (exponential; of
likenesses, skewness 1, either way); bounded (most at both ends; of likenesses, even); rare (of one image in ten). Half
of the variance is the prompt's. How many copies are found bench/near_duplicates.py measures, on photos.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from bench.command_line import make_parser, write_results
from utils.evaluation import intervals
from utils.evaluation.choice import TAKE, Candidate, choose
from utils.evaluation.scorer import Scorer

LAYOUTS = ((1, 4), (4, 1), (8, 1), (5, 4), (25, 4))  # prompts, images of each: run.sh's and --dreambench's
SUBJECTS, OF_SUBJECT = 30, 100
RARE = 0.1
Trial = Callable[[np.random.Generator], bool | None]  # whether it was wrong; None: not said


class Row(NamedTuple):
    """A line of the table: the worst rate of its shapes and true values."""

    sentence: str
    condition: str
    said: float
    wrong: float
    worst: str


def noise(draws: np.random.Generator, shape: str, size: tuple[int, ...]) -> np.ndarray:
    """Mean 0, variance 1."""
    if shape == "skewed":
        return draws.exponential(size=size) - 1
    if shape in ("a little skewed", "skewed the other way"):
        return (draws.gamma(4, size=size) / 2 - 2) * (1 if shape == "a little skewed" else -1)
    if shape == "bounded":
        return (draws.beta(0.5, 0.5, size=size) - 0.5) * math.sqrt(8)
    if shape == "even":
        return (draws.random(size) - 0.5) * math.sqrt(12)
    if shape == "rare":
        share = draws.random(size) < RARE
        return (share - RARE + 0.05 * draws.normal(size=size)) / math.sqrt(RARE * (1 - RARE) + 0.0025)
    return draws.normal(size=size)


def changes(draws: np.random.Generator, shape: str, num_prompts: int, num_images: int) -> np.ndarray:
    """[P,K], mean 0, variance 1: half of the variance is the prompt's, but a rare change is an image's."""
    values = noise(draws, shape, (num_prompts, num_images))
    of_prompt = noise(draws, shape, (num_prompts, 1))
    return values if shape == "rare" else (values + of_prompt) / math.sqrt(2)


def rate(trial: Trial, trials: int) -> tuple[float, float]:
    """(how often it is said, how often it is said and wrong)."""
    draws = np.random.Generator(np.random.Philox(key=0))
    answers = [trial(draws) for _ in range(trials)]
    return sum(answer is not None for answer in answers) / trials, sum(answer is True for answer in answers) / trials


def of_share(probability: float, number: int) -> Trial:
    def trial(draws: np.random.Generator) -> bool:
        low, high = intervals.share(int(draws.binomial(number, probability)), number)
        return not low <= probability <= high

    return trial


def of_change(shape: str, layout: tuple[int, int], truth: float, form: str) -> Trial:
    """One of describe_change's forms: "rose by" or "fell by" with an interval, "changed by less", "cannot be told"."""

    def trial(draws: np.random.Generator) -> bool | None:
        said = intervals.describe_change(changes(draws, shape, *layout) + truth)
        if not said["text"].startswith(form):
            return None
        if said["interval"] is None:
            return False
        low, high = said["interval"]
        return abs(truth) > max(-low, high) if "less" in form else not low <= truth <= high

    return trial


def of_subjects(shape: str, truth: float) -> Trial:
    """The mean over subjects."""

    def trial(draws: np.random.Generator) -> bool | None:
        values = noise(draws, shape if shape != "rare" else "normal", (SUBJECTS, 1))
        values = values + changes(draws, shape, SUBJECTS, OF_SUBJECT).mean(axis=1, keepdims=True) + truth
        found = intervals.mean_change(values, are_means=True)
        return None if found is None else not found.low <= truth <= found.high

    return trial


def of_way(shape: str, layout: tuple[int, int], truth: float, spread: float) -> Trial:
    """Base at 0.35, photos at 0.75, with `spread` among images; seeds are half of what a picture has of its own."""

    def trial(draws: np.random.Generator) -> bool | None:
        prompts = 0.05 * draws.normal(size=(layout[0], 1))
        seeds = noise(draws, "normal" if shape == "rare" else shape, layout)
        base = 0.35 + prompts + spread * seeds
        if shape == "rare":
            model = base + 0.1 * spread * draws.normal(size=layout) + 0.4 * truth * (draws.random(layout) < RARE)
            right = truth * RARE
        else:
            model = 0.35 + 0.4 * truth + prompts + spread * (seeds + noise(draws, shape, layout)) / math.sqrt(2)
            right = truth
        if layout[0] <= intervals.MOST_FIXED:
            right *= 0.4 / (0.4 - prompts.mean())  # of these very prompts
        way = intervals.share_of_way(model, base, np.array([0.7, 0.8]))
        return None if way is None else not way.low <= right <= way.high

    return trial


def of_gain(shape: str, layout: tuple[int, int], num_candidates: int) -> Trial:
    """Whether any of the candidates is said to have gained, none of which has: drawn as the base is."""

    def trial(draws: np.random.Generator) -> bool | None:
        base = noise(draws, shape, layout)
        found = [noise(draws, shape, layout) - base for _ in range(num_candidates)]
        return True if any(intervals.has_risen(values, num_candidates) for values in found) else None

    return trial


def of_best(shape: str, num_candidates: int, num_images: int, step: float) -> Trial:
    """Candidates along a line, neighbours alike: is the best left out?"""

    def trial(draws: np.random.Generator) -> bool:
        own = noise(draws, shape, (num_candidates, num_images)).cumsum(axis=0) / math.sqrt(num_candidates)
        truth = step * np.arange(num_candidates)
        values = truth[:, None] + noise(draws, shape, (1, num_images)) + own
        return not intervals.not_worse_than_best(values)[-1]

    return trial


def of_choice(shape: str, num_candidates: int, num_images: int) -> Trial:
    """Whether the choice takes one of several that have learnt nothing."""

    def trial(draws: np.random.Generator) -> bool | None:
        before, *found = (noise(draws, shape, (2, num_images)) for _ in range(1 + num_candidates))
        candidates = [
            Candidate(
                f"checkpoint-{step}",
                step / num_candidates,
                likeness[0],
                before[0],
                (8, 8, 8),
                0,
                intervals.share_of_way(likeness[1:], before[1:], np.array([9.0, 11.0])),
            )
            for step, likeness in enumerate(found, 1)
        ]
        return True if choose(candidates, Scorer("clip", "", "", "")).answer == TAKE else None

    return trial


def worst(sentence: str, condition: str, trials: dict[str, Trial], number: int) -> Row:
    """The row of the trial that is wrong most often; of how it is said, the most."""
    rates = {name: rate(trial, number) for name, trial in trials.items()}
    name = max(rates, key=lambda name: rates[name][1])
    return Row(sentence, condition, max(said for said, _ in rates.values()), rates[name][1], name)


def rows(number: int) -> Iterator[Row]:
    """The whole table."""
    shapes = ("normal", "skewed", "bounded", "rare")
    for of in (4, 8, 20, 100):
        trials = {f"{p:g}": of_share(p, of) for p in (0.01, 0.1, 0.3, 0.5, 0.9, 0.98)}
        yield worst("k of n (95%: a to b)", f"n = {of}", trials, number)
    for layout in LAYOUTS:
        where = f"{layout[0]} prompts x {layout[1]}"
        is_enough = math.prod(layout) >= intervals.LEAST_IMAGES
        for form in ("rose by", "fell by", "changed by less") if is_enough else (intervals.UNKNOWN,):
            sizes = (-0.5, -0.2, 0.0, 0.2, 0.5)
            trials = {f"{s}, {truth:g}": of_change(s, layout, truth, form) for s in shapes for truth in sizes}
            yield worst(form, where, trials, number)
        likeness = ("normal", "a little skewed", "skewed the other way", "even", "rare")
        cases = [
            (s, truth, spread) for s in likeness for truth, spread in ((0, 0.05), (0.5, 0.05), (0.5, 0.12), (1, 0.05))
        ]
        trials = {f"{s}, {t:g} of the way, {w:g} apart": of_way(s, layout, t, w) for s, t, w in cases}
        yield worst("p% of the way (95%: a to b)", where, trials, number)
        trials = {f"{s}, {c} candidates": of_gain(s, layout, c) for s in shapes for c in (1, 4, 8)}
        yield worst("Take X: its likeness has risen", where, trials, number)
    for images in (4, 8):
        trials = {f"{s}, {c} candidates": of_choice(s, c, images) for s in shapes for c in (1, 4, 8)}
        yield worst("Take X. (of those that learnt nothing)", f"{images} images each", trials, number)
    trials = {f"{s}, {truth:g}": of_subjects(s, truth) for s in shapes for truth in (0.0, 0.5)}
    yield worst("mean of subjects (95%: a to b)", f"{SUBJECTS} subjects x {OF_SUBJECT}", trials, number)
    for images in (4, 8, 16):
        trials = {
            f"{s}, {c} candidates, {step:g} apart": of_best(s, c, images, step)
            for s in ("normal", "a little skewed", "skewed the other way", "even")
            for c in (2, 4, 8)
            for step in (0.0, 0.2)
        }
        yield worst("Take X: not told from the best", f"{images} images each", trials, number)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = make_parser(__doc__, __spec__.name)
    parser.add_argument("--quick", action="store_true", help="200 trials a case in the place of 10,000")
    args = parser.parse_args(argv)
    found: list[Any] = []
    print("| sentence | of | said, at most | wrong, at most | where |\n|---|---|---|---|---|")
    for row in rows(200 if args.quick else 10_000):
        found.append(row._asdict())
        print(f"| {row.sentence} | {row.condition} | {row.said:.0%} | {row.wrong:.1%} | {row.worst} |", flush=True)
    write_results(found, args.json)
    return found


if __name__ == "__main__":
    main()
