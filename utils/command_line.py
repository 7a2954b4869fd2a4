"""What the command lines of both scripts share: numbers, the parser, --config, and errors in one line."""

import argparse
import atexit
import contextlib
import difflib
import io
import json
import math
import os
import select
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from utils.errors import EXIT_USER_ERROR, RunFailed, UserError
from utils.files.ownership import expand_home
from utils.runtime.environment import is_main

EXIT_INTERRUPTED = 130
SECONDS_FOR_RANK_0 = 0.5  # torchrun ends all ranks as soon as one has failed: rank 0 must have spoken by then
# Of an earlier run's arguments, those that a new one does not take over.
PER_RUN = ("config", "debug", "dry_run", "resume_from_checkpoint", "allow_changes", "overwrite_output_dir")

REPEATABLE = argparse._AppendAction  # flags that may be given several times, and are lists in a file

Value = str | None | list[str]
Number = TypeVar("Number", int, float)


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return _bounded(int, text, 1)


def non_negative_int(text: str) -> int:
    """An integer of at least 0."""
    return _bounded(int, text, 0)


def seed_int(text: str) -> int:
    """An integer in [0, 2**32): what every generator takes."""
    value = _bounded(int, text, 0)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not below 2**32")
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    return _bounded(float, text, 0)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _bounded(float, text, 0)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def unit_float(text: str) -> float:
    """A number in [0, 1)."""
    value = _bounded(float, text, 0)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def _bounded(kind: type[Number], text: str, least: int) -> Number:
    try:
        value = kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
    return value


def as_path(text: str) -> Path:
    """The path that the user meant: `~` and `~name` are home folders, also if the shell has not seen to it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: is a shell variable unset?")
    return expand_home(text)


def as_text(text: str) -> str:
    """A prompt as it was typed, also if Python reads command lines in another encoding than UTF-8 (LC_ALL=C)."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError("holds characters that are not valid UTF-8: type it again") from None


class Help(argparse.HelpFormatter):
    """As wide as the terminal, up to 119 columns; a number is N or X, not the flag's own name once more."""

    def __init__(self, prog: str):
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, max_help_position=36 if columns > 100 else 24, width=min(119, columns - 1))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "text")
        return "N" if "int" in kind else "X" if "float" in kind else "TEXT"


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose complaints are UserErrors that name the nearest flag; a flag of type Path is as_path's,
    one without a type as_text's.
    """

    def __init__(self, refuse: Callable[[list[str]], None] = lambda words: None, **options: Any):
        self.refuse = refuse  # raises UserError if a word is a flag that is not here on purpose
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)
        self.register("type", Path, as_path)
        self.register("type", None, as_text)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ") if "unrecognized" in message else ""
        if unknown:
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            flags = [flag for action in shown for flag in action.option_strings]
            near = difflib.get_close_matches(unknown.partition(" ")[0].partition("=")[0], flags, n=1, cutoff=0.7)
            message += f"; did you mean {near[0]}?" if near else "; --help lists the flags"
        raise UserError(message)


def with_config(argv: list[str], parser: Parser) -> list[str]:
    """`argv` with `--config FILE` replaced by the flags in FILE, put first: what the command line says wins.

    Keys are the flags without their dashes. true switches a flag without value on; false, null and nothing leave a key
    out. Raises UserError if the file cannot be read and for keys that are no flags.
    """
    finder = type(parser)(add_help=False)  # the Parser of utils.arguments, whose complaints are UserErrors
    finder.add_argument("--config", type=Path)
    found, rest = finder.parse_known_args(argv)
    if found.config is None:
        return argv
    flags = {name.lstrip("-"): action for action in parser._actions for name in action.option_strings}
    tokens, given = [], {word.partition("=")[0] for word in rest}
    for key, value in _read_config(found.config).items():
        if key not in flags or key in ("config", "help"):
            parser.refuse([f"--{key}"])
            shown = [name for name, action in flags.items() if action.help != argparse.SUPPRESS]
            near = difflib.get_close_matches(key, shown, n=1, cutoff=0.6)
            advice = f"did you mean {near[0]}?" if near else "keys are the flags that --help lists, without dashes"
            raise UserError(f"{found.config}: there is no flag {key!r}; {advice}")
        is_repeatable = isinstance(flags[key], REPEATABLE)
        if isinstance(value, list) and not is_repeatable:
            raise UserError(f"--config {found.config}: {key} holds a list; the flag takes one value")
        if is_repeatable and f"--{key}" in given:
            continue
        for each in value if isinstance(value, list) else [value]:
            tokens += _tokens(found.config, key, each, takes_value=flags[key].nargs != 0)
    return tokens + rest


def _tokens(path: Path, key: str, value: str | None, takes_value: bool) -> list[str]:
    if value is None:
        return []
    if takes_value:
        return [f"--{key}={value}"]
    if value.lower() not in ("true", "false"):
        raise UserError(f"{path}: {key} is {value!r}, but it can only be true or false")
    return [f"--{key}"] if value.lower() == "true" else []


def _read_config(path: Path) -> dict[str, Value]:
    """Keys and values of the file as they are spelled there; None for null."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return _read_json(path, text) if text.lstrip().startswith("{") else _read_yaml(path, text)


def _read_json(path: Path, text: str) -> dict[str, Value]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"--config {path} is not valid JSON: {error}") from None
    if "program" in values and isinstance(values.get("arguments"), dict):
        values = {key: value for key, value in values["arguments"].items() if key not in PER_RUN}
    return {key: _spelled(path, key, value) for key, value in values.items()}


def _spelled(path: Path, key: str, value: object) -> Value:
    """A JSON value as it would stand on a command line."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    _refuse_nested(path, {key: value} if isinstance(value, dict | list) else {})
    return None if value is None else json.dumps(value) if isinstance(value, bool) else str(value)


def _read_yaml(path: Path, text: str) -> dict[str, Value]:
    """Scalars as they are spelled: by YAML's own rules `no` would be false, and 1e-6 no number."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path} does not hold lines of the form 'flag: value'")
    values: dict[str, Value] = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in values:
            raise UserError(f"--config {path}, line {key.start_mark.line + 1}: {key.value!r} is there twice")
        if isinstance(value, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in value.value):
            values[key.value] = [each.value for each in value.value]
            continue
        _refuse_nested(path, {} if isinstance(value, yaml.ScalarNode) else {key.value: value})
        is_null = value.style is None and value.value.lower() in ("", "null", "~")
        values[key.value] = None if is_null else value.value
    return values


def _refuse_nested(path: Path, nested: dict) -> None:
    if nested:
        raise UserError(f"--config {path}: {next(iter(nested))} holds a list or a table; a flag takes one value")


def run_main(
    main: Callable[[list[str] | None], int | None], argv: list[str] | None = None, *, interrupted: str = "interrupted"
) -> int:
    """Runs `main(argv)` and returns the exit code.

    A UserError becomes one line on stderr, from rank 0 only, and exit code 2, as does a package that is not installed;
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
            line += "; 'bash setup.sh' installs what is needed, 'python -m utils.doctor' says what is wrong"
        _say(line if exit_code > 128 else f"error: {line}")
        return EXIT_USER_ERROR if isinstance(error, UserError | ModuleNotFoundError) else exit_code
    except KeyboardInterrupt:
        _say(interrupted)
        return EXIT_INTERRUPTED


def leave(exit_code: int) -> NoReturn:
    """Ends the process as sys.exit does (threads are joined, what is registered at exit is called, output is flushed),
    but leaves its memory to the system: taking millions of objects and a GPU's context apart takes seconds.

    If what was printed cannot be flushed, sys.exit says so as it always does.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # the interpreter's own: it also ends idle pools of threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(exit_code)
    os._exit(exit_code)


def make_printable() -> None:
    """Whatever is printed from now on can be: what a terminal's encoding lacks is spelled out, as \\u732b; what cannot
    be written (the disk is full, a pipe's reader or the terminal has gone, there is no stdout) is dropped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a stream whose file was exchanged beneath it
                stream = _lasting(stream)
                stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream over a _LastingFile; itself if it is a stand-in (pytest's), of no file, or one of those."""
    if type(stream) is not io.TextIOWrapper or type(getattr(stream.buffer, "raw", stream.buffer)) is not io.FileIO:
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    file = _LastingFile(stream)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # as Python does with -u
        encoding=stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _LastingFile(io.FileIO):
    """The file of an open stream. What cannot be written is dropped, each time anew: a full disk may get space."""

    def __init__(self, stream: io.TextIOWrapper):
        super().__init__(stream.fileno(), "w", closefd=False)
        self.stream = stream  # it closes the file when nothing holds it any more

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        with contextlib.suppress(OSError):
            while rest:
                count = super().write(rest)
                if count is None:  # whoever shares the terminal set it not to wait
                    select.select([], [self], [])
                else:
                    rest = rest[count:]
        return len(data)


def _say(line: str) -> None:
    if is_main():
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0)
