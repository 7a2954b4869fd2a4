"""Photos with known pixels, and ICC profiles with known colours."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pillow_jxl  # noqa: F401  it registers itself
from PIL import ExifTags, Image
from pillow_heif import register_heif_opener

register_heif_opener()

# Where the stored image's first row and first column are seen, by the EXIF standard's table of orientations.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
CORNERS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]  # top left, top right, bottom left, bottom right


def upright_picture(height: int = 32, width: int = 64) -> np.ndarray:
    """uint8 [H,W,3]: a quarter in each of CORNERS."""
    picture = np.empty((height, width, 3), np.uint8)
    quarters = [(rows, columns) for rows in (0, 1) for columns in (0, 1)]
    for (row, column), colour in zip(quarters, CORNERS, strict=True):
        rows = slice(row * height // 2, (row + 1) * height // 2)
        picture[rows, column * width // 2 : (column + 1) * width // 2] = colour
    return picture


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera writes into the file for `upright` to be seen."""
    first_row, first_column = ORIENTATIONS[orientation]
    stored = upright if first_row in ("top", "bottom") else upright.transpose(1, 0, 2)
    flips = [axis for axis, side in enumerate((first_row, first_column)) if side in ("bottom", "right")]
    return np.flip(stored, flips) if flips else stored


def turned(orientation: int) -> Image.Exif:
    """What says how a stored picture is seen."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def corner_colours(image: Image.Image) -> list[tuple[int, ...]]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


# How Pillow writes each format with the least loss.
LOSSLESS = dict(
    jpeg=dict(quality=100, subsampling=0),
    webp=dict(lossless=True),
    heif=dict(quality=-1, chroma=444),
    avif=dict(quality=100, subsampling="4:4:4"),
    jxl=dict(lossless=True, use_container=True),
)


def save(folder: Path, name: str, image: Image.Image, **options) -> Path:
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    return folder / name


D50 = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))  # XYZ of D50
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def srgb_curve(x: np.ndarray) -> np.ndarray:
    """Light of values in [0,1], IEC 61966-2-1."""
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def _s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc_profile(space: bytes, name: str, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2 with these tags (ICC.1:2001-04, 6.1 to 6.5)."""
    text = name.encode() + b"\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": described, b"cprt": b"text\0\0\0\0none\0", b"wtpt": b"XYZ \0\0\0\0" + _s15(*D50)} | tags
    table, content = struct.pack(">I", len(tags)), b""
    first = 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", first + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I", first + len(content)) + bytes(4) + b"\x02\x10\0\0" + kind + space + pcs
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _s15(*D50)
    return head.ljust(128, b"\0") + table + content


def tone_curve(curve: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A curve tag of 1,024 points."""
    points = (curve(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(points)) + points.tobytes()


def rgb_profile(name: str, primaries: tuple, curve: Callable[[np.ndarray], np.ndarray] = srgb_curve) -> bytes:
    """A profile of red, green and blue, XYZ each."""
    tags = {key: b"XYZ \0\0\0\0" + _s15(*xyz) for key, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    return icc_profile(b"RGB ", name, tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), tone_curve(curve)))


def grey_profile(name: str, curve: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A profile of greys."""
    return icc_profile(b"GRAY", name, {b"kTRC": tone_curve(curve)})


def cmyk_profile(name: str, lab: Callable[[tuple[int, ...]], tuple[float, float, float]]) -> bytes:
    """A printer's profile from the L*a*b* of the 16 mixtures of full inks, (cyan, magenta, yellow, black)."""
    nodes = [lab((c, m, y, k)) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    table = bytes(round(value) for L, a, b in nodes for value in (L * 2.55, a + 128, b + 128))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + table + ramp * 3
    return icc_profile(b"CMYK", name, {b"A2B0": lut}, pcs=b"Lab ")
