"""What a user can mend is said in one line, without a traceback."""

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do."""


def run_main(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Runs `main(argv)` and returns the exit code.

    A UserError becomes one line on stderr, from rank 0 only, and exit code 2; with --debug among the arguments it is
    raised with its traceback. So does a package that is not installed.
    """
    try:
        return main(argv) or 0
    except (UserError, ModuleNotFoundError) as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            raise
        if isinstance(error, ModuleNotFoundError):
            error = f"{error}; 'bash setup.sh' installs what is needed, 'python -m utils.doctor' says what is amiss"
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
