"""Errors that become one line on the terminal, without a traceback."""

import os
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
SHOWN = 3  # of a list


class UserError(ValueError):
    """Something the user can fix: the message says what is wrong, where, and what to do."""

    exit_code = EXIT_USER_ERROR


class TryAgain(UserError):
    """Something that may pass without the user: the same command will do then."""

    exit_code = EXIT_TRY_AGAIN


class RunFailed(RuntimeError):
    """The training failed or was asked to stop: the message says what is kept and how to resume."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def of_file(error: OSError, place: Path, advice: str) -> str:
    """What the system says of a file, and its name; with `advice` if that lies in `place`, or if it names none."""
    file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | Path) else place
    is_there = place.absolute() in (file.absolute(), *file.absolute().parents)
    return f"{file}: {error.strerror or error}{f'; {advice}' if is_there else ''}"


def reason_of(error: BaseException) -> str:
    """What the system says of a failure, without its number and the file, or the first line of any other error."""
    return getattr(error, "strerror", None) or first_line(error)


def shortened(found: list[str]) -> list[str]:
    """The first few of some findings, and how many more there are."""
    return [*found[:SHOWN], f"and {len(found) - SHOWN} more"] if found[SHOWN:] else found


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
