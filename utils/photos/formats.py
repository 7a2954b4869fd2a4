"""Opening a photo: formats that need a package beside Pillow, and camera raw files, known by what is in the file."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from utils.errors import UserError, first_line

# By content as far as it goes; a name like these is refused too: who shoots raw gives the developed photo another.
RAW_SUFFIXES = (
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .gpr .iiq .k25 .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw "
    ".rw2 .rwl .sr2 .srf .srw .x3f"
).split()
RAW_MAGIC = {  # (offset, bytes): the format
    (0, b"FUJIFILMCCD-RAW"): "RAF",
    (0, b"IIRO"): "ORF",
    (0, b"IIRS"): "ORF",
    (0, b"MMOR"): "ORF",
    (0, b"IIU\0"): "RW2",
    (0, b"FOVb"): "X3F",
    (0, b"\0MRM"): "MRW",
    (4, b"ftypcrx "): "CR3",
    (6, b"HEAPCCDR"): "CRW",
    (8, b"CR\2"): "CR2",
}

HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
JPEG_XL_MAGIC = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
PHOTO_SUFFIXES = {".heic", ".heics", ".heif", ".heifs", ".hif", ".avif", ".avifs", ".jxl"}
NOT_AN_IMAGE = "not an image"

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of damaged files is said in our own words


@contextlib.contextmanager
def open_photo(path: Path) -> Iterator[Image.Image]:
    """The photo as Pillow opens it, not read yet; UserError if damaged, camera raw, or of a missing package."""
    try:
        with _as_pillow_opens_it(path) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # every decoder has exceptions of its own
        raise UserError(f"{path} cannot be decoded: {_reason(error)}; replace or remove it") from error


@contextlib.contextmanager
def _as_pillow_opens_it(path: Path) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about large or slightly damaged photos are the table's to make
        prepare(path)
        with Image.open(path) as image:
            yield image


def why_not_a_photo(path: Path) -> str | None:
    """NOT_AN_IMAGE, or None for a photo, by the header; UserError as open_photo, and if its name promises one."""
    try:
        with _as_pillow_opens_it(path):
            return None
    except UnidentifiedImageError:
        suffix = path.suffix.lower()
        if prepare(path) or suffix in PHOTO_SUFFIXES or Image.registered_extensions().get(suffix) in Image.OPEN:
            raise UserError(f"{path} cannot be read as an image; replace it or remove it from the folder") from None
        return NOT_AN_IMAGE
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}; replace it or remove it from the folder") from error


def _reason(error: Exception) -> str:
    return "it is damaged or cut short" if "libjxl" in str(error) else first_line(error)


def prepare(path: Path) -> bool:
    """Imports the package that reads this file; whether it needs one. UserError if missing, and for camera raw."""
    with path.open("rb") as file:
        head = file.read(64)
    if raw := _camera_raw(path, head):
        raise UserError(f"{path} is a camera raw photo ({raw}), which is not read: develop it and save a JPEG")
    brands = _brands(head)
    if brands & AVIF_BRANDS:
        return True  # Pillow reads it; before 11.3 it does not
    try:
        if brands & HEIF_BRANDS:
            from pillow_heif import register_heif_opener  # only if there is such a photo: a tenth of a second

            register_heif_opener()
        elif head.startswith(JPEG_XL_MAGIC):
            importlib.import_module("pillow_jxl")  # it registers itself
        else:
            return False
    except ImportError as error:
        kind, package = ("HEIF", "pillow-heif") if brands else ("JPEG XL", "pillow-jxl-plugin")
        raise UserError(
            f"{path} is a {kind} photo, and the package {package} cannot be imported ({first_line(error)}); "
            f"'bash setup.sh' installs it, or convert the photo to JPEG or PNG"
        ) from None
    return True


def _brands(head: bytes) -> set[bytes]:
    """Of an ISO base media file (ISO/IEC 14496-12), its major and compatible brands; of others none."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[start : start + 4] for start in range(16, end, 4))}


def _camera_raw(path: Path, head: bytes) -> str | None:
    """The format's name if this is a camera raw file, which may be called anything."""
    for (offset, magic), name in RAW_MAGIC.items():
        if head.startswith(magic, offset):
            return name
    suffix = path.suffix.lower()
    return suffix[1:].upper() if suffix in RAW_SUFFIXES else None
