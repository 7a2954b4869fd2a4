"""Errors that become one line on the terminal, without a traceback."""

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something the user can fix: the message says what is wrong, where, and what to do."""


class RunFailed(RuntimeError):
    """The training failed or was asked to stop: the message says what is kept and how to resume."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
