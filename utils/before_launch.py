"""run.sh's training: its mistakes in one line, before torchrun buries it, and then torchrun.

What needs torch is left to the run's own checks. Arguments: the training script, its own, --, evaluate.py's.
"""

import argparse
import contextlib
import difflib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from utils.arguments import parse_args, training_parser
from utils.command_line import run_main
from utils.errors import UserError
from utils.evaluation.arguments import parse_args as parse_evaluation
from utils.evaluation.plan import EvaluationPlan, plan_candidates
from utils.evaluation.prompts import all_prompts, other_prompts, places_for
from utils.evaluation.samples import check_same_model, drawn_from, plan_models, plan_samples
from utils.files.ownership import check_writable
from utils.preflight.checks import run_preflight
from utils.preflight.resources import check_disk
from utils.run.lineage import list_checkpoints
from utils.run.plan import Plan
from utils.run.resume import Sources
from utils.runtime import environment
from utils.values import meant

RUN_SH = Path(__file__).parent.parent / "run.sh"
OF_OTHERS = ("", "CONFIG", "DEBUG", "HELP", "VERSION")  # flags' names that other programs' variables have too
LEAST_STEPS = 100  # of a run that is worth checkpoints of its own
RECIPE = 20, 1e-6  # steps and learning rate
OF_THE_RECIPE = (
    "note: 20 steps at 1e-6 are the recipe's trial, and change hardly anything; for a result set MAX_TRAIN_STEPS=400 "
    "LEARNING_RATE=2e-6 (README.md: How long)"
)
ALIKE = 0.89  # INSTANCE_ID, which clouds set, is less like INSTANCE_DIR


class Ready(NamedTuple):
    """What to launch: the training's arguments, and about how many denoising steps evaluate.py's pictures take."""

    training: list[str]
    num_draws: int


def launch(argv: list[str]) -> list[str]:
    """torchrun's arguments; a --dry_run takes this process's place. Raises UserError at the first mistake."""
    script, *rest = argv
    ready = check(rest)
    if "--dry_run" in ready.training:
        os.execv(sys.executable, [sys.executable, script, *ready.training])
    os.environ[environment.DRAWS_AFTERWARDS] = str(ready.num_draws)
    print("1 of 2: train", flush=True)
    here = ["--standalone", "--local_addr=127.0.0.1"]  # also on a machine whose name may not resolve
    return [*here, f"--nproc_per_node={os.environ.get('NPROC') or 1}", script, *ready.training]


def check(argv: list[str]) -> Ready:
    """Raises UserError at the first mistake, but with --dry_run; on stdout nothing."""
    place = len(argv) - 1 - argv[::-1].index("--")
    training, evaluation = argv[:place], argv[place + 1 :]
    args, evaluated = parse_args(training), parse_evaluation(evaluation)
    if args.output_dir != (folder := evaluated.finetuned_model_name_or_path):
        raise UserError(f"--output_dir {args.output_dir}, but {folder} is evaluated: set OUTPUT_DIR instead")
    if (args.max_train_steps, args.learning_rate) == RECIPE:
        print(OF_THE_RECIPE, file=sys.stderr)
    with contextlib.redirect_stdout(io.StringIO()):
        plan, sources, _ = run_preflight(args, is_quick=True)
    if plan is None or sources is None:
        return Ready(training, 0)
    if "checkpointing_steps" not in plan.changed | {word.partition("=")[0][2:] for word in training}:
        plan = with_a_checkpoint(plan, sources)
        training.append(f"--checkpointing_steps={plan.checkpointing_steps}")
    check_writable(evaluated.output_dir, f"RESULT_DIR {evaluated.output_dir}")
    if not evaluated.overwrite_output_dir:
        photos = {photo.sha256: photo.prompt for photo in sources.dataset.photos}
        check_same_model(evaluated.output_dir, drawn_from(plan.output_dir, photos))
    left = checkpoints_left(plan)
    check_checkpoints(evaluated.checkpoint or [], left, plan.checkpointing_steps)
    return Ready(training, num_draws(evaluated, plan, left))


def with_a_checkpoint(plan: Plan, sources: Sources) -> Plan:
    """Of a run that is too short for one by default the same with one in its middle, which --choose compares with the
    result, and one at its end, if the disk has room for them."""
    if not LEAST_STEPS <= plan.num_steps < plan.checkpointing_steps:
        return plan
    halved = plan._replace(checkpointing_steps=(plan.num_steps + 1) // 2)
    try:
        check_disk(halved, sources.base, sources.first_step)
    except UserError:
        return plan
    return halved


def checkpoints_left(plan: Plan) -> list[str]:
    """Names of those that there will be after the run."""
    every, limit = plan.checkpointing_steps, plan.checkpoints["total_limit"] or 0
    left = [f"checkpoint-{step}" for step in range(every, plan.num_steps + 1, every)][-limit:]
    return [found.path.name for found in list_checkpoints(plan.output_dir)] + left


def check_checkpoints(names: list[str], left: list[str], every: int) -> None:
    """UserError for one to evaluate that is not there and that the run will not leave."""
    for name in names:
        if not (name in left or f"checkpoint-{name}" in left or (name == "all" and left)):
            shown = ", ".join(left[:4] + ["..."] * (len(left) > 4)) or "none"
            raise UserError(f"CHECKPOINT={name}: of checkpoints there will be {shown} (CHECKPOINTING_STEPS={every})")


def num_draws(evaluated: argparse.Namespace, plan: Plan, left: list[str]) -> int:
    """About how many denoising steps of one picture evaluate.py's take together, if it can read the class."""
    arguments, final = plan.arguments, EvaluationPlan(**vars(evaluated))
    final.models = plan_models(evaluated.checkpoint or [], evaluated.strength or [1.0])
    places = places_for(Path(arguments["pretrained_model_name_or_path"]))
    final.prompts = all_prompts([arguments["instance_prompt"] or ""], "thing", other_prompts("thing"), places)
    quick = [plan_candidates(final, left, plan.num_steps)] if final.choose else []
    return sum(len(plan_samples(each)) * each.num_inference_steps for each in [final, *quick])


def variables() -> None:
    """Prints what run.sh's shell reads to have its variables as they are meant; on stderr, those that look alike."""
    names = re.findall(r"\$\{([A-Z_]+):[-+]", RUN_SH.read_text(encoding="utf-8"))
    for name in set(names) & os.environ.keys():
        line = f"export {name}={shlex.quote(meant(os.environ[name]))}\n"
        sys.stdout.buffer.write(os.fsencode(line))  # as it came, whatever Python prints in
    for line in strays(os.environ.keys() - set(names), names):
        print(f"note: run.sh does not read {line}", file=sys.stderr)


def strays(others: Iterable[str], own: Iterable[str]) -> Iterator[str]:
    """A phrase for each variable that looks like one of run.sh's `own`, or like a flag."""
    flags = [name for name, flag in training_parser().flags.items() if flag.help != argparse.SUPPRESS]
    how = {name[2:].upper(): f"a flag says that: bash run.sh {name}" for name in flags}
    how = {name: advice for name, advice in how.items() if name not in OF_OTHERS}
    how |= {name: f"is {name} meant?" for name in own}
    for name in sorted(others):
        same = [each for each in how if sorted(each) == sorted(name.upper())]
        like = same or difflib.get_close_matches(name.upper(), how, n=1, cutoff=ALIKE)
        yield from (f"{name}: {how[each]}" for each in like[:1])


def main() -> list[str]:
    """launch() of the command line; at a mistake the process ends with its line on stderr."""
    found: list[str] = []
    code = run_main(lambda argv: found.extend(launch(sys.argv[1:])))
    return sys.exit(code) if code else found
