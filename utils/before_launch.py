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
from collections.abc import Mapping
from pathlib import Path

from utils.arguments import parse_args, training_parser
from utils.command_line import positive_int, run_main
from utils.errors import UserError
from utils.evaluation.arguments import parse_args as parse_evaluation
from utils.files.ownership import check_writable
from utils.preflight.checks import run_preflight
from utils.run.lineage import list_checkpoints
from utils.run.plan import Plan
from utils.values import meant

RUN_SH = Path(__file__).parent.parent / "run.sh"
OF_OTHERS = ("CONFIG", "DEBUG", "HELP")  # flags' names that other programs' variables have too
ALIKE = 0.89  # INSTANCE_ID, which clouds set, is less like INSTANCE_DIR
NPROC_WORDS = ("auto", "cpu", "gpu")  # that torchrun knows


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
        plan, _, _ = run_preflight(args, is_quick=True)
    if evaluated and plan:
        check_writable(evaluated.output_dir, f"RESULT_DIR {evaluated.output_dir}")
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


def own_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that run.sh reads, as they are meant. Raises UserError."""
    names = re.findall(r"\$\{([A-Z_]+):[-+]", RUN_SH.read_text(encoding="utf-8"))
    own = {name: meant(environment.get(name, "")) for name in names}
    if (nproc := own["NPROC"]) and nproc not in NPROC_WORDS:
        try:
            positive_int(nproc)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"NPROC: {error}") from None
    return own


def strays(environment: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """A line for each variable that looks like one of run.sh's, or like a flag, and is read by nobody."""
    flags = [name for name, flag in training_parser().flags.items() if flag.help != argparse.SUPPRESS]
    how = {flag[2:].upper(): f"a flag says that: bash run.sh {flag}" for flag in flags if flag.startswith("--")}
    how = {name: advice for name, advice in how.items() if name not in OF_OTHERS}
    how |= {name: f"is {name} meant?" for name in own}
    lines = []
    for name in sorted(environment.keys() - own.keys()):
        upper = name.upper()
        same = [each for each in how if sorted(each) == sorted(upper)] or difflib.get_close_matches(
            upper, how, 1, ALIKE
        )
        lines += [f"note: run.sh does not read {name}: {how[same[0]]}"] if same else []
    return lines


def say_variables(argv: list[str] | None = None) -> None:
    """Prints what run.sh's shell has to read to have its variables as they are meant, and strays on stderr."""
    own = own_variables(os.environ)
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in own.items() if name in os.environ))
    print("".join(f"{line}\n" for line in strays(os.environ, own)), end="", file=sys.stderr)


def variables() -> int:
    """The exit code: 0, or 2 with a line on stderr."""
    return run_main(say_variables)


def main() -> int:
    """The exit code: 0, or 2 with a line on stderr."""
    return run_main(check)
