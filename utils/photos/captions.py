"""Captions: what each photo shows, from the files beside it."""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.errors import UserError
from utils.values import as_text, meant, read_text

SUFFIXES = {".txt", ".caption"}
METADATA = "metadata.jsonl"  # of Hugging Face's image folders, which diffusers' scripts read
TEXT_FIELDS = ("text", "prompt", "caption")
HOW = f"captions are NAME.txt or NAME.caption beside NAME.jpg, or {METADATA} with file_name and text in each line"
# Files that other programs keep captions in, and texts that lie in a folder of photos and are about the folder.
OTHER_SUFFIXES = {".cap", ".caps", ".captions", ".prompt", ".prompts", ".tag", ".tags", ".jsonl"}
OTHER_NAMES = re.compile(r"(.*[^a-z])?(captions?|prompts?)([^a-z].*)?\.(json|csv|tsv|parquet|ya?ml|toml|xml)")
METADATA_TABLE = re.compile(r"metadata\.(csv|tsv|parquet)")
ABOUT_THE_FOLDER = set(
    "readme license licenses licence licences copying copyright notice credits notes attribution sources references "
    "todo about changelog".split()
)


def read_captions(photos: list[Path], others: list[Path]) -> tuple[dict[Path, str], set[Path]]:
    """{photo: what it shows, on one line} from `others`, the rest of their folder, and the files that said so.

    A caption's name is the photo's with or without its suffix, in any case and either Unicode form. Raises UserError
    for one that is empty, cannot be read, or is of no photo here, and for two of one photo that differ.
    """
    find_by_stem, find_by_name = _by_name(photos, by_stem=True), _by_name(photos, by_stem=False)
    texts = {path for path in others if path.suffix.lower() in SUFFIXES and path.is_file()}
    # A text that has a photo's name is its caption, be it notes.txt beside notes.jpg.
    files = [path for path in others if looks_like_captions(path) or (path in texts and find_by_stem(path.stem))]
    said: dict[Path, list[tuple[Path, str]]] = defaultdict(list)
    for path in files:
        if path.name.lower() == METADATA:
            for photo, text in _read_metadata(path, find_by_name):
                said[photo].append((path, text))
        elif path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} looks like captions and is not read: {HOW}; or move it out of the folder")
        elif not (owners := find_by_stem(path.stem)):
            raise UserError(f"{path} looks like a caption, and there is no photo called {path.stem!r}: rename it")
        else:
            text = _read_text(path, owners[0])
            for photo in owners:
                said[photo].append((path, text))
    return {photo: _only_one(photo, found) for photo, found in said.items()}, set(files)


def looks_like_captions(path: Path) -> bool:
    """Whether a file's name says that it holds captions; a README or a licence does not."""
    name, suffix = path.name.lower(), path.suffix.lower()
    if name.startswith(".") or path.is_dir():
        return False
    if suffix == ".txt" and ABOUT_THE_FOLDER & set(re.split(r"[^a-z]+", path.stem.lower())):
        return False
    if suffix in SUFFIXES | OTHER_SUFFIXES:
        return True
    return bool(OTHER_NAMES.fullmatch(name) or METADATA_TABLE.fullmatch(name))


def _by_name(photos: list[Path], *, by_stem: bool) -> Callable[[str], list[Path]]:
    """A function from a name to the photos that have it: exactly but for its Unicode form, or else in any case."""
    exact: dict[str, list[Path]] = defaultdict(list)
    in_any_case: dict[str, list[Path]] = defaultdict(list)
    for photo in photos:
        for name in {photo.name, photo.stem} if by_stem else {photo.name}:
            exact[_composed(name)].append(photo)
            in_any_case[_composed(name).casefold()].append(photo)
    return lambda name: exact.get(_composed(name)) or in_any_case.get(_composed(name).casefold(), [])


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _read_text(path: Path, photo: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}, the caption of {photo.name}, is not a file that can be read; replace or remove it")
    named = f"{path}, the caption of {photo.name},"
    text = as_text(read_text(path, named), f"{named} ")
    if not text:
        raise UserError(f"{path}, the caption of {photo.name}, is empty; write what the photo shows, or remove it")
    return text


def _read_metadata(path: Path, find: Callable[[str], list[Path]]) -> Iterator[tuple[Path, str]]:
    """(photo, caption) of each line."""
    for number, line in enumerate(read_text(path, str(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is not JSON: {error}") from None
        entry = entry if isinstance(entry, dict) else {}
        name = entry.get("file_name")
        said = [entry[field] for field in TEXT_FIELDS if isinstance(entry.get(field), str)]
        texts = {as_text(text, f"{path}, line {number}, ") for text in said} - {""}
        if not isinstance(name, str) or len(texts) != 1:
            raise UserError(f"{path}, line {number}, needs a file_name and one text or prompt that says what it shows")
        found = find(meant(name).removeprefix("./"))
        if not found:
            raise UserError(f"{path}, line {number}: there is no photo {name!r} here; correct or remove the line")
        yield from ((photo, texts.copy().pop()) for photo in found)


def _only_one(photo: Path, found: list[tuple[Path, str]]) -> str:
    for path, text in found[1:]:
        if text != found[0][1]:
            two = f"in {found[0][0].name} and in {path.name}"
            raise UserError(f"{photo} has two captions that differ, {two}; keep one of them")
    return found[0][1]
