"""The mistakes of a command line in one line, before torchrun buries it: run.sh calls this, silent if all is well.

What needs torch is left to the run's own checks. Arguments: the training script's, --, evaluate.py's.
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

from utils.arguments import parse_args, training_parser
from utils.command_line import run_main
from utils.errors import UserError
from utils.evaluation.arguments import parse_args as parse_evaluation
from utils.evaluation.samples import check_same_model, drawn_from
from utils.files.ownership import check_writable
from utils.preflight.checks import run_preflight
from utils.run.lineage import list_checkpoints
from utils.run.plan import Plan
from utils.values import meant

RUN_SH = Path(__file__).parent.parent / "run.sh"
OF_OTHERS = ("", "CONFIG", "DEBUG", "HELP", "VERSION")  # flags' names that other programs' variables have too
ALIKE = 0.89  # INSTANCE_ID, which clouds set, is less like INSTANCE_DIR


def check(argv: list[str] | None = None) -> None:
    """Raises UserError at the first mistake; prints nothing."""
    argv = sys.argv[1:] if argv is None else argv
    training, evaluation = argv, []
    if "--" in argv:
        place = len(argv) - 1 - argv[::-1].index("--")
        training, evaluation = argv[:place], argv[place + 1 :]
    args, evaluated = parse_args(training), parse_evaluation(evaluation) if evaluation else None
    if evaluated and args.output_dir != (folder := evaluated.finetuned_model_name_or_path):
        raise UserError(f"--output_dir {args.output_dir}, but {folder} is evaluated: set OUTPUT_DIR instead")
    with contextlib.redirect_stdout(io.StringIO()):
        plan, sources, _ = run_preflight(args, is_quick=True)
    if evaluated and plan and sources:
        check_writable(evaluated.output_dir, f"RESULT_DIR {evaluated.output_dir}")
        if not evaluated.overwrite_output_dir:
            photos = {photo.sha256: photo.prompt for photo in sources.dataset.photos}
            check_same_model(evaluated.output_dir, drawn_from(plan.output_dir, photos))
        check_checkpoints(evaluated.checkpoint or [], plan)


def check_checkpoints(names: list[str], plan: Plan) -> None:
    """UserError for one to evaluate that is not there and that the run will not leave."""
    every, limit = plan.checkpointing_steps, plan.checkpoints["total_limit"] or 0
    left = [f"checkpoint-{step}" for step in range(every, plan.num_steps + 1, every)][-limit:]
    left = [found.path.name for found in list_checkpoints(plan.output_dir)] + left
    for name in names:
        if not (name in left or f"checkpoint-{name}" in left or (name == "all" and left)):
            shown = ", ".join(left[:4] + ["..."] * (len(left) > 4)) or "none"
            raise UserError(f"CHECKPOINT={name}: of checkpoints there will be {shown} (CHECKPOINTING_STEPS={every})")


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


def main() -> int:
    """The exit code: 0, or 2 with a line on stderr."""
    return run_main(check)
