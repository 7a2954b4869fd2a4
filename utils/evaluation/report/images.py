"""Images as data URIs, as large as a page of so many of them can hold."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

WEBP_QUALITY = 85
SIDES = (640, 512, 384, 288, 216, 160, 120, 90, 64)  # an image's longer side in pixels
LOSSLESS_SIDE = 128  # images this small are kept as they are


class Picture(NamedTuple):
    """What an <img> needs; width and height are those of the original in pixels."""

    src: str
    alt: str
    width: int
    height: int


def data_uri(image: Image.Image, most_bytes: int) -> str:
    """The image as large as `most_bytes` allow, its own size at most; the smallest of SIDES if even that is more."""
    own = max(image.size)
    for side in (side for side in (own, *SIDES) if side <= min(own, SIDES[0])):
        file, smaller = io.BytesIO(), image.convert("RGB")
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        smaller.save(file, "WEBP", lossless=own <= LOSSLESS_SIDE, quality=WEBP_QUALITY)
        if file.tell() <= most_bytes:
            break
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(image: Image.Image | Path, alt: str, most_bytes: int) -> Picture:
    """The image, which may be a file, within the page."""
    if isinstance(image, Path):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    return Picture(data_uri(image, most_bytes), alt, *image.size)
