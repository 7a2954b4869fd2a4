"""What a user can mend is said in one line, without a traceback."""

import os
import sys
import time
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
SECONDS_FOR_RANK_0 = 0.5  # torchrun ends all ranks as soon as one has failed: rank 0 must have spoken by then


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do."""


class RunFailed(RuntimeError):
    """Something that went wrong while training, or a wish to stop: the message says what is kept and how to go on."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def run_main(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Runs `main(argv)` and returns the exit code.

    A UserError becomes one line on stderr, from rank 0 only, and exit code 2, as does a package that is not installed;
    RunFailed and failures of the file system (a full disk, say) likewise, with exit code 1; Ctrl-C 130. With --debug
    among the arguments, errors are raised with their tracebacks.
    """
    try:
        return main(argv) or 0
    except (UserError, RunFailed, OSError, ModuleNotFoundError) as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            raise
        mistake = isinstance(error, (UserError, ModuleNotFoundError))
        if isinstance(error, ModuleNotFoundError):
            error = f"{error}; 'bash setup.sh' installs what is needed, 'python -m utils.doctor' says what is amiss"
        prefix = "" if getattr(error, "exit_code", 1) > 128 else "error: "
        _say(f"{prefix}{error}")
        return EXIT_USER_ERROR if mistake else getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        _say("interrupted before the training had begun")
        return EXIT_INTERRUPTED


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0)
