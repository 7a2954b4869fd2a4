"""JSON on a disk: read with one line for what is wrong, written whole or not at all."""

import json
import os
from pathlib import Path

from utils.errors import UserError


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises UserError naming the file where it is missing or not one."""
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


def write_json(path: Path, value: dict) -> None:
    """Writes beside, syncs and renames: a reader sees the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.partial")
    # backslashreplace: file names that are not UTF-8 hold lone surrogates, and \udcXX is how JSON writes those.
    with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def keep_rows(path: Path, last_step: int, names: frozenset[str] = frozenset({"loss", "skipped"})) -> list[dict]:
    """Cuts a metrics.jsonl down to the rows up to `last_step` that have `names`, whole lines only; returns them."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if last_step else []
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            row = json.loads(line)
            if (rows[-1]["step"] if rows else -1) < row["step"] <= last_step and names <= row.keys():
                rows.append(row)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(beside, path)
    return rows
