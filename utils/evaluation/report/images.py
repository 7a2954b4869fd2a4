"""Images as data URIs, no larger than a page of many needs them."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

JPEG_QUALITY = 90
SIDES = ((120, 384), (240, 256), (480, 192), (1000, 128))  # up to so many images: the longer side in pixels
SMALLEST = 96
LOSSLESS_SIDE = 128  # images this small are PNGs: fewer bytes than one would think, and no artefacts


class Picture(NamedTuple):
    """What an <img> needs."""

    src: str
    alt: str
    width: int
    height: int


def thumbnail_side(num_images: int) -> int:
    """The longer side of each image in pixels, so that all of them stay well below 10 MB."""
    return next((side for most, side in SIDES if num_images <= most), SMALLEST)


def data_uri(image: Image.Image, side: int) -> str:
    """The image, at most `side` pixels on its longer side, as PNG if it is small, else as JPEG."""
    image = image.convert("RGB")
    small = max(image.size) <= LOSSLESS_SIDE
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(image: Image.Image | Path, alt: str, side: int) -> Picture:
    """The image, which may be a file, within the page; its width and height are those of the original."""
    if isinstance(image, Path):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    return Picture(data_uri(image, side), alt, *image.size)
