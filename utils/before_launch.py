"""The mistakes of a command line in one line, before torchrun buries it: run.sh calls this, silent if all is well.

What needs torch is left to the run's own checks. Arguments: the training script's, --, evaluate.py's.
"""

import contextlib
import io
import sys

from utils.arguments import parse_args
from utils.command_line import run_main
from utils.errors import UserError
from utils.evaluation.arguments import parse_args as parse_evaluation
from utils.preflight.checks import run_preflight


def check(argv: list[str] | None = None) -> None:
    """Raises UserError at the first mistake; prints nothing."""
    argv = sys.argv[1:] if argv is None else argv
    training, evaluation = argv, []
    if "--" in argv:
        place = len(argv) - 1 - argv[::-1].index("--")
        training, evaluation = argv[:place], argv[place + 1 :]
    args = parse_args(training)
    if evaluation:
        evaluated = parse_evaluation(evaluation).finetuned_model_name_or_path
        if args.output_dir != evaluated:
            raise UserError(f"--output_dir {args.output_dir}, but {evaluated} is evaluated: set OUTPUT_DIR instead")
    with contextlib.redirect_stdout(io.StringIO()):
        run_preflight(args, is_quick=True)


def main() -> int:
    """The exit code: 0, or 2 with a line on stderr."""
    return run_main(check)
