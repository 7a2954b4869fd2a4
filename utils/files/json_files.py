"""JSON on a disk: read with one line for what is wrong, written whole or not at all."""

import contextlib
import json
from pathlib import Path

from utils.errors import UserError
from utils.files.atomic import replace_path


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises UserError naming the file if it is missing or not one."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; copy or download the whole pipeline again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy or download the whole pipeline again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; copy or download it again")
    return value


def read_json_or_none(path: Path) -> dict | None:
    """The JSON object in a file; None if it is missing, unreadable or not one."""
    try:
        return read_json(path)
    except UserError:
        return None


def write_json(path: Path, value: dict) -> None:
    """A reader of `path` sees the old object or the whole new one."""
    # backslashreplace: file names that are not UTF-8 hold lone surrogates, and \udcXX is how JSON writes those.
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    replace_path(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file, less the lines that are damaged; none if the file is missing."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def keep_rows(path: Path, last_step: int, names: set[str]) -> list[dict]:
    """Cuts JSON lines down to those up to `last_step` that have `names`, in order of their "step"; returns them."""
    rows: list[dict] = []
    for row in read_rows(path) if last_step else []:
        step, previous = row.get("step"), rows[-1]["step"] if rows else -1
        if isinstance(step, int | float) and previous < step <= last_step and names <= row.keys():
            rows.append(row)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    replace_path(path, lambda part: part.write_text(lines, encoding="utf-8"))
    return rows
