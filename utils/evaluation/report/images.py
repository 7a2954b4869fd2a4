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


def webp(image: Image.Image, side: int) -> bytes:
    """The RGB image as WebP, at most `side` pixels on its longer side."""
    lossless = max(image.size) <= LOSSLESS_SIDE
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=WEBP_QUALITY)
    return file.getvalue()


def data_uri(image: Image.Image, most_bytes: int) -> str:
    """The image as large as `most_bytes` allow, its own size at most; the smallest of SIDES if even that is more."""
    image = image.convert("RGB")
    own = max(image.size)
    sides = [side for side in (own, *SIDES) if side <= min(own, SIDES[0])]
    for side in sides:
        content = webp(image, side)
        if len(content) <= most_bytes:
            break
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def picture(image: Image.Image | Path, alt: str, most_bytes: int) -> Picture:
    """The image, which may be a file, within the page."""
    if isinstance(image, Path):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    return Picture(data_uri(image, most_bytes), alt, *image.size)
