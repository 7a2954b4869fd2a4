"""Which pipeline folder a name means: a folder, a single checkpoint file, a name of the Hugging Face Hub; another VAE.

Single files are converted once, into a cache folder under a name made of their hash. Nothing is downloaded.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from utils import PROGRAM
from utils.errors import UserError
from utils.files.atomic import move, staging_folder, sync_tree
from utils.files.hashing import sha256_of
from utils.files.json_files import read_json, read_json_or_none, write_json
from utils.files.lock import locked
from utils.models.folder import FROZEN_PARTS, MODEL_INDEX, UNET_STEM
from utils.models.weight_files import kind_of
from utils.runtime.environment import is_main
from utils.values import as_path

SOURCE_FILE = "source.json"  # in a converted folder: from which file it was made
CACHE_VARIABLE = "DREAMBOOTH_CACHE"
VAE_FLAG = "--pretrained_vae_name_or_path"


def base_folder(path: Path, flag: str, vae: Path | None = None) -> Path:
    """The pipeline folder that `path` means, with the VAE `vae` in the place of its own if one is given.

    A folder that does not look like anything is returned as it is, for the checks to say what is wrong with it.
    Raises UserError if a file cannot be converted.
    """
    try:
        folder = _converted(path, flag, "model") if path.is_file() else from_hub_cache(path)
        if path.is_file() and vae is None and not (folder / "vae").is_dir():
            raise UserError(f"{flag} {path} holds no VAE: give one with {VAE_FLAG}")
        return folder if vae is None else _with_vae(folder, vae)
    except OSError as error:
        raise UserError(
            f"{flag} {path}: {error.filename or cache_folder()} cannot be written ({error.strerror or error}); make "
            f"room there, or name another folder for what is made of such files: {CACHE_VARIABLE}=DIR"
        ) from error


def cache_folder() -> Path:
    """Where converted files are kept: $DREAMBOOTH_CACHE, else a folder in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get(CACHE_VARIABLE):
        return as_path(own, f"{CACHE_VARIABLE} ")
    return as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / PROGRAM


def _converted(path: Path, flag: str, kind: str) -> Path:
    """The folder into which a single file was converted, now or earlier; `kind` is model or vae."""
    kind_of(path)  # says what it is if it holds no weights
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".lock"):  # of several ranks one converts it, the others wait; without locks each does
        # A file is known by its place, size and times, of which nobody can set the last: hashing gigabytes takes time.
        identity = dict(kind=kind, path=str(path.resolve()), **_state(path))
        for record in sorted(cache.glob(f"*/{SOURCE_FILE}")):
            if (read_json_or_none(record) or {}).get("file") == identity and _is_whole(record.parent):
                if is_main():
                    print(f"{flag} {path}: converted earlier, into {record.parent}", flush=True)
                return record.parent
        digest = sha256_of(path)
        folder = cache / f"{path.stem[:60]}-{kind}-{digest[:16]}"
        is_there = _is_whole(folder)  # made of a copy of the file elsewhere
        if is_main():
            how = "its conversion is in" if is_there else "converting it into"
            print(f"{path} is one file: {how} {folder}", flush=True)
        if not is_there:
            _convert(path, folder, kind)
        made = {str(each.relative_to(folder)): _state(each) for each in folder.glob("*/*") if each.is_file()}
        made |= {MODEL_INDEX: _state(folder / MODEL_INDEX)} if kind == "model" else {}
        write_json(folder / SOURCE_FILE, dict(program=PROGRAM, sha256=digest, file=identity, made=made))
        return folder


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return dict(size=found.st_size, mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns)


def _is_whole(folder: Path) -> bool:
    """Whether every file of a converted folder is there as it was written; else it is made again."""
    made = (read_json_or_none(folder / SOURCE_FILE) or {}).get("made") or {}
    files = {folder / name: state for name, state in made.items()}
    return bool(made) and all(path.is_file() and _state(path) == state for path, state in files.items())


def _convert(path: Path, folder: Path, kind: str) -> None:
    """The file `path` as the folder `folder`, which is there whole or not at all; says what there is to say of it."""
    from utils.models import importing  # torch: only if there is a file to convert

    write = importing.import_vae if kind == "vae" else importing.import_single_file
    with staging_folder(folder.parent) as staging:
        notes = write(path, staging)
        sync_tree(staging)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        move(staging, folder)
    if is_main():
        for note in notes:
            print(f"note: {path}: {note}", flush=True)


def _with_vae(folder: Path, vae: Path) -> Path:
    """A folder of links in the cache: the pipeline `folder` with another VAE."""
    place = _vae_folder(vae)
    if not (folder / MODEL_INDEX).is_file():
        return folder  # the checks say what is wrong with it
    parts = {part: folder / part for part in (*FROZEN_PARTS, "unet") if (folder / part).is_dir()}
    links = {part: str(path.resolve()) for part, path in (parts | {"vae": place}).items()}
    index = read_json(folder / MODEL_INDEX) | {"vae": ["diffusers", "AutoencoderKL"]}
    name = hashlib.sha256(repr((links, index)).encode()).hexdigest()[:16]
    cache = cache_folder()
    made = cache / f"{folder.resolve().name}-with-{place.resolve().name}-{name}"
    if _is_linked(made, links):
        return made
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".lock"), staging_folder(cache) as staging:  # of several ranks one makes it
        for part, target in links.items():
            (staging / part).symlink_to(target)
        write_json(staging / MODEL_INDEX, index)
        if not _is_linked(made, links):
            shutil.rmtree(made, ignore_errors=True)
            move(staging, made)
    return made


def _is_linked(made: Path, links: Iterable[str]) -> bool:
    return (made / MODEL_INDEX).is_file() and all((made / part).is_dir() for part in links)


def _vae_folder(vae: Path) -> Path:
    """The folder with a VAE's config.json and weights that `vae` means: it, a pipeline's, or a converted file's."""
    if vae.is_file() and vae.name.startswith(UNET_STEM) and (vae.parent / "config.json").is_file():
        return vae.parent
    if vae.is_file():
        return _converted(vae, VAE_FLAG, "vae") / "vae"
    folder = from_hub_cache(vae)
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"{VAE_FLAG} {vae} is no VAE: give a folder with its config.json and weights, or one file")
    return folder


def from_hub_cache(path: Path) -> Path:
    """The snapshot that a name of the Hub means in its local cache; else `path` itself."""
    name = str(path)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download  # only for such a name: its import takes as long as all the checks
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return path
