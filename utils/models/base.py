"""Which pipeline folder a name means: a folder, a single checkpoint file, a name of the Hugging Face Hub; another VAE.

Single files are converted once, into a cache folder under a name made of their hash. Nothing is downloaded.
"""

import hashlib
import os
from pathlib import Path

from utils import PROGRAM
from utils.errors import UserError
from utils.files.atomic import move, staging_folder, sync_tree
from utils.files.hashing import sha256_of
from utils.files.json_files import read_json, read_json_or_none, write_json
from utils.files.lock import locked
from utils.models.folder import FROZEN_PARTS, MODEL_INDEX, UNET_STEM, check_file
from utils.runtime.environment import is_main
from utils.values import as_path

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SOURCE_FILE = "source.json"  # in a converted folder: from which file it was made
CACHE_VARIABLE = "DREAMBOOTH_CACHE"
VAE_FLAG = "--pretrained_vae_name_or_path"


def base_folder(path: Path, flag: str, vae: Path | None = None) -> Path:
    """The pipeline folder that `path` means, with the VAE `vae` in the place of its own if one is given.

    A folder that does not look like anything is returned as it is, for the checks to say what is wrong with it.
    Raises UserError if a file cannot be converted.
    """
    try:
        folder = _converted(path, flag, "model") if _is_single_file(path) else from_hub_cache(path)
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


def _is_single_file(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SINGLE_FILES


def _converted(path: Path, flag: str, kind: str) -> Path:
    """The folder into which a single file was converted, now or earlier; `kind` is model or vae."""
    check_file(path)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".lock"):  # of several ranks one converts it, the others wait; without locks each does
        place = path.resolve()
        found = place.stat()
        # A folder is known by the very file's place, size and time of change: hashing gigabytes takes seconds.
        identity = dict(kind=kind, path=str(place), size=found.st_size, mtime_ns=found.st_mtime_ns)
        for record in sorted(cache.glob(f"*/{SOURCE_FILE}")):
            if (read_json_or_none(record) or {}).get("file") == identity:
                if is_main():
                    print(f"{flag} {path}: converted earlier, into {record.parent}", flush=True)
                return record.parent
        digest = sha256_of(path)
        folder = cache / f"{path.stem[:60]}-{kind}-{digest[:16]}"
        is_there = folder.is_dir()  # made of a copy of the file elsewhere
        if is_main():
            print(
                f"{path} is one file: {'its conversion is in' if is_there else 'converting it into'} {folder}",
                flush=True,
            )
        if not is_there:
            _convert(path, folder, kind)
        write_json(folder / SOURCE_FILE, dict(program=PROGRAM, sha256=digest, file=identity))
        return folder


def _convert(path: Path, folder: Path, kind: str) -> None:
    """The file `path` as the folder `folder`, which is there whole or not at all; says what there is to say of it."""
    from utils.models import importing  # torch: only if there is a file to convert

    write = importing.import_vae if kind == "vae" else importing.import_single_file
    with staging_folder(folder.parent) as staging:
        notes = write(path, staging)
        sync_tree(staging)
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
    made = cache_folder() / f"{folder.resolve().name}-with-{place.resolve().name}-{name}"
    if (made / MODEL_INDEX).is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staging_folder(made.parent) as staging:
            for part, target in links.items():
                (staging / part).symlink_to(target)
            write_json(staging / MODEL_INDEX, index)
            if not made.exists():
                move(staging, made)
    except OSError:
        if not (made / MODEL_INDEX).is_file():  # another rank was quicker
            raise
    return made


def _vae_folder(vae: Path) -> Path:
    """The folder with a VAE's config.json and weights that `vae` means: it, a pipeline's, or a converted file's."""
    if _is_single_file(vae) and vae.name.startswith(UNET_STEM) and (vae.parent / "config.json").is_file():
        return vae.parent
    if _is_single_file(vae):
        return _converted(vae, VAE_FLAG, "vae") / "vae"
    folder = from_hub_cache(vae)
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{VAE_FLAG} {vae} is no VAE: give a folder with its config.json and weights, a pipeline's folder, or one "
            f".safetensors or .ckpt file"
        )
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
