"""What a value means that the user wrote: on a command line, in an environment file, a JSON file, a list, a caption.

A shell replaces variables and takes quotes and blanks away; in a file nobody has. All paths and prompts come here.
"""

import argparse
import os
import re
from pathlib import Path

from utils.errors import UserError

AROUND = r"[\s\ufeff\u200b\u200e\u200f\u2060]"  # blanks of every kind, line ends, and what nobody sees
INVISIBLE = re.compile("[\u00ad\ufeff\u200b\u200e\u200f\u2060]")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’"}
VARIABLE = r"\$(?P<brace>\{)?(?P<name>[A-Za-z_]\w*)(?(brace)\})"
LIST_MARK = re.compile(r"(?:[-*•]|\d+[.)])\s+")
# What other programs read in a prompt, and would here be words like any others.
OF_OTHERS = (
    (
        r"(?i)((?<!\S)(?:--|—)[a-z][\w-]*|^(?:negative )?prompts?:|^steps: \d+)",
        "size, seed and negative prompt are flags here",
    ),
    (r"(<\w+:[^<>]*>|\bembedding:\S+)", "a prompt loads no file here"),
    (
        r"([(\[][^()\[\]]*[^\d\s()\[\]:]\s*:\s*\d*\.?\d+\s*[)\]]|\)(?:\d*\.\d+|\++)|\(\(|::-?\d)",
        "words have no weights here",
    ),
    (r"([{\[][^{}\[\]]*\|[^{}\[\]]*[}\]]|__\w+__)", "nothing is chosen at random here: write each prompt out"),
)


class Unclear(UserError, argparse.ArgumentTypeError):
    """A value that cannot be meant; argparse puts the flag's name before it."""


def meant(text: str) -> str:
    """`text` without what a line of a file leaves around a value: blanks, its end, a byte order mark, quotes."""
    text = re.sub(f"^{AROUND}+|{AROUND}+$", "", text)
    inside = text[1:-1]
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and text[0] not in inside and text[-1] not in inside:
        return meant(inside)
    return text


def as_path(text: str | Path, where: str = "") -> Path:
    """The path that the user meant: `~`, `~name` and variables are replaced. Raises Unclear that begins with `where`.

    A folder whose name has a `$` in it keeps it, if there is no such variable.
    """
    text = meant(str(text))
    if not text:
        raise Unclear(f"{where}is empty: is a shell variable unset?")
    _check_control(text, where)
    if "$(" in text or "`" in text:
        raise Unclear(f"{where}{text!r} has a command in it, which no shell has run: write the path out")
    try:
        text = _replaced(VARIABLE, text, where)
    except Unclear:
        if not os.path.lexists(text):
            raise
    text = os.path.expanduser(text)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # from a file in UTF-8, on a system of another encoding (LC_ALL=C)
        text = os.fsdecode(text.encode("utf-8", "replace"))
    return Path(text)


def as_text(text: str, where: str = "") -> str:
    """A prompt or a name on one line, also if Python reads command lines in another encoding than UTF-8 (LC_ALL=C).

    Raises Unclear, which begins with `where`, also for what only another program understands in a prompt.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            text = os.fsencode(text).decode("utf-8")
        except UnicodeError:
            raise Unclear(f"{where}holds characters that are not valid UTF-8: type it again") from None
    text = " ".join(INVISIBLE.sub("", meant(text)).split())
    _check_control(text, where)
    for pattern, instead in OF_OTHERS:
        if found := re.search(pattern, text):
            raise Unclear(f"{where}{found[1]!r} is another program's, and would be read as words: {instead}")
    return _replaced(rf"(?<!\w){VARIABLE}", text, where)


def as_prompt(text: str, where: str = "") -> str:
    """as_text's, which says something: an empty prompt shows anything."""
    if text := as_text(text, where):
        return text
    raise Unclear(f"{where}is empty: is a shell variable unset?")


def read_text(path: Path, named: str) -> str:
    """A file that the user wrote: UTF-8, or UTF-16 with its mark. Raises UserError, which begins with `named`."""
    try:
        content = path.read_bytes()
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{named} cannot be read as UTF-8 text: {getattr(error, 'strerror', '') or error}") from None


def read_prompts(path: Path, named: str) -> list[str]:
    """One prompt a line, numbered or not; empty lines and those that begin with # are passed over. UserError."""
    lines = [LIST_MARK.sub("", meant(line)) for line in read_text(path, named).splitlines()]
    lines = ["" if line.startswith("#") else line for line in lines]
    first = next((line for line in lines if line), "")
    if not first or first[0] in "[{":
        raise UserError(f"{named} holds {'no prompt' if not first else 'a structure'}: write one prompt a line")
    return [as_prompt(line, f"{named}, line {number}: ") for number, line in enumerate(lines, 1) if line]


def _check_control(text: str, where: str) -> None:
    if found := CONTROL.search(text):
        raise Unclear(f"{where}{text!r} holds {found[0]!r}, which is no letter: type it again")


def _replaced(pattern: str, text: str, where: str) -> str:
    def value(found: re.Match) -> str:
        if not os.environ.get(found["name"]):
            raise Unclear(f"{where}{text!r}: the variable {found['name']} is not set: write out what is meant")
        return meant(os.environ[found["name"]])

    return re.sub(pattern, value, text)
