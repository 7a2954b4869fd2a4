"""What the command lines of both scripts share: numbers, the parser, --config, and errors in one line."""

import argparse
import atexit
import contextlib
import difflib
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from utils import HOW_TO_INSTALL, __version__
from utils.errors import EXIT_USER_ERROR, RunFailed, UserError
from utils.runtime.environment import is_main, num_ranks
from utils.runtime.process import make_printable
from utils.values import as_path, as_text, meant, read_text

EXIT_INTERRUPTED = 130
SECONDS_FOR_RANK_0 = 0.5  # torchrun ends all ranks as soon as one has failed: rank 0 must have spoken by then
# Of an earlier run's arguments, those that a new one does not take over.
PER_RUN = ("config", "debug", "dry_run", "json", "resume_from_checkpoint", "allow_changes", "overwrite_output_dir")

HOW_CONFIG = 'write it like {"learning_rate": 1e-6, "center_crop": true}, with the flags without their dashes'
_leaving: list[int] = []  # the exit code, once leave() was called
Number = TypeVar("Number", int, float)


def number(
    kind: type[Number], *, least: float = 0, above: float = -1, below: float = math.inf
) -> Callable[[str], Number]:
    """The type of a flag whose values are finite numbers, at least `least`, above `above` and below `below`."""

    def check(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
        if value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above}")
        if value >= below:
            raise argparse.ArgumentTypeError(f"{text} is not below {'2**32' if below == 2**32 else below}")
        return value

    check.__name__ = kind.__name__  # Parser has N for an int and X for a float in the help
    return check


positive_int = number(int, least=1)
non_negative_int = number(int)
seed_int = number(int, below=2**32)  # what every generator takes
positive_float = number(float, above=0)
non_negative_float = number(float)
unit_float = number(float, below=1)


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    """As wide as the terminal, up to 119 columns."""
    columns = shutil.get_terminal_size().columns
    return argparse.HelpFormatter(prog, max_help_position=36 if columns > 100 else 24, width=min(119, columns - 1))


class Repeated(argparse.Action):
    """A flag that may be given several times: its values are a list, also in a file."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), value])


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose complaints are UserErrors that name the nearest flag; a flag of type Path is as_path's,
    one without a type as_text's. `flags` are its arguments by their names, with dashes.
    """

    def __init__(self, refuse: Callable[[list[str]], None] = lambda words: None, **options: Any):
        self.refuse = refuse  # raises UserError if a word is a flag that is not here on purpose
        self.flags: dict[str, argparse.Action] = {}
        super().__init__(allow_abbrev=False, formatter_class=_help_formatter, **options)
        self.register("type", Path, as_path)
        self.register("type", None, as_text)
        self.register("action", "append", Repeated)
        if self.add_help:
            self.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="say it and exit")

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        return self._kept(super().add_argument(*names, **options))

    def add_group(self, title: str) -> Callable[..., None]:
        """add(name, help, type, default, **options) for a new group in the help; the type bool is a switch's."""
        group = self.add_argument_group(title)

        def add(name: str, text: str, kind: Any = None, default: Any = None, **options: Any) -> None:
            value = dict(action="store_true") if kind is bool else dict(type=kind, default=default)
            if default is not None:
                text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
            self._kept(group.add_argument(name, help=text, **value, **options))

        return add

    def _kept(self, flag: argparse.Action) -> argparse.Action:
        """In the help a value is N, X, PATH or TEXT, not the flag's own name once more."""
        self.flags |= dict.fromkeys(flag.option_strings, flag)
        if flag.metavar is None and flag.choices is None and flag.option_strings and flag.nargs != 0:
            flag.metavar = {"int": "N", "float": "X", "Path": "PATH"}.get(getattr(flag.type, "__name__", ""), "TEXT")
        return flag

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Of words as they were meant."""
        words = sys.argv[1:] if args is None else args
        if "\r" in words:
            raise UserError("the command comes from a file with Windows line ends: sed -i 's/\\r$//' FILE mends it")
        return super().parse_known_args([_word(word) for word in words], namespace)

    def nearest(self, unknown: str) -> str | None:
        """Of the flags that --help shows, the one that was probably meant."""
        shown = [name for name, flag in self.flags.items() if flag.help != argparse.SUPPRESS]
        return next(iter(difflib.get_close_matches(unknown, shown, n=1, cutoff=0.7)), None)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            near = self.nearest(unknown.partition(" ")[0].partition("=")[0])
            message += f"; did you mean {near}?" if near else "; --help lists the flags"
        raise UserError(message)


def _word(word: str) -> str:
    """A word of the command line without what a file leaves around a value."""
    flag, equals, value = word.partition("=")
    return f"{flag}={meant(value)}" if equals and flag.startswith("-") else meant(word)


def with_config(argv: list[str], parser: Parser) -> list[str]:
    """`argv` with `--config FILE` replaced by the flags in FILE, put first: what the command line says wins.

    Keys are the flags without their dashes. true switches a flag without value on; false and null leave a key out.
    Raises UserError if the file cannot be read and for keys that are no flags.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--config", type=Path)
    found, rest = finder.parse_known_args(argv)
    if found.config is None:
        return argv
    tokens, given = [], {word.partition("=")[0] for word in rest}
    for key, value in _read_config(found.config).items():
        flag = parser.flags.get(f"--{key}")
        if flag is None or key in ("config", "help", "version"):
            parser.refuse([f"--{key}"])
            near = parser.nearest(f"--{key}")
            advice = f"did you mean {near[2:]}?" if near else "keys are the flags that --help lists, without dashes"
            raise UserError(f"{found.config}: there is no flag {key!r}; {advice}")
        is_list = isinstance(flag, Repeated) and isinstance(value, list)
        if isinstance(value, list | dict) and not is_list:
            raise UserError(f"--config {found.config}: {key} holds a list or a table; the flag takes one value")
        if isinstance(flag, Repeated) and f"--{key}" in given:
            continue
        for each in value if is_list else [value]:
            tokens += _tokens(found.config, key, each, takes_value=flag.nargs != 0)
    return tokens + rest


def _tokens(path: Path, key: str, value: object, takes_value: bool) -> list[str]:
    """A JSON value as it would stand on a command line."""
    if value is None:
        return []
    spelled = str(value).lower() if isinstance(value, bool) else str(value)
    if takes_value:
        return [f"--{key}={spelled}"]
    if spelled not in ("true", "false"):
        raise UserError(f"{path}: {key} is {value!r}, but it can only be true or false")
    return [f"--{key}"] if spelled == "true" else []


def _read_config(path: Path) -> dict[str, Any]:
    """Keys and values of the file; of a run.json, the arguments of its run."""
    try:
        values = json.loads(read_text(path, f"--config {path}"))
    except json.JSONDecodeError as error:
        raise UserError(f"--config {path} is not valid JSON: {error}; {HOW_CONFIG}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} does not hold an object of flags; {HOW_CONFIG}")
    if "program" in values and isinstance(values.get("arguments"), dict):
        return {key: value for key, value in values["arguments"].items() if key not in PER_RUN}
    return values


def run_main(
    main: Callable[[list[str] | None], int | None], argv: list[str] | None = None, *, interrupted: str = "interrupted"
) -> int:
    """Runs `main(argv)` and returns the exit code.

    A UserError becomes one line on stderr, from rank 0 only, and its exit code, and a package that is not installed 2;
    RunFailed and failures of the file system (a full disk, say) likewise, with exit code 1; Ctrl-C 130, with the line
    `interrupted`. With --debug among the arguments, errors are raised with their tracebacks.
    """
    make_printable()
    try:
        return main(argv) or 0
    except (UserError, RunFailed, OSError, ModuleNotFoundError) as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            raise
        line, exit_code = str(error), getattr(error, "exit_code", 1)
        if isinstance(error, ModuleNotFoundError):
            line, exit_code = f"{line}; {HOW_TO_INSTALL}", EXIT_USER_ERROR
        _say(line if exit_code > 128 else f"error: {line}")
        return exit_code
    except KeyboardInterrupt:
        _say(interrupted)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def mistakes_for_all_ranks(argv: list[str] | None) -> Iterator[None]:
    """A context in which a UserError of one rank, before the ranks have met, becomes one of all: none waits for it."""
    try:
        yield
    except UserError as error:
        if num_ranks() > 1 and "--dry_run" not in (sys.argv[1:] if argv is None else argv):
            from utils.runtime.ranks import meet

            mistake: Future = Future()
            mistake.set_exception(error)
            meet(mistake.result, lambda one, other: [])
        raise


def leave(exit_code: int) -> NoReturn:
    """Ends the process as sys.exit does (threads are joined, what is registered at exit is called, output is flushed),
    but leaves its memory to the system: taking millions of objects and a GPU's context apart takes seconds. Only of a
    script that is all of its process: a notebook's kernel, which runs it by %run, goes on.
    """
    frame = inspect.currentframe()
    if frame and frame.f_back and frame.f_back.f_back is None:
        _leaving.append(exit_code)
    sys.exit(exit_code)


@atexit.register  # when this module is imported, before the libraries: what they register is called before it
def _end_at_once() -> None:
    """The end of leave(). If what was printed cannot be flushed, the interpreter says so as it always does."""
    if _leaving:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_leaving[0])


def _say(line: str) -> None:
    if is_main():
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0)
