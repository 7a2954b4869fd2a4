"""Bars along a photo's edges: how thick they are, and what is none."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from utils.photos.decoding import find_bars


def noise(width: int = 120, height: int = 90) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def framed(colour, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> Image.Image:
    photo = noise()
    image = Image.new("RGB", (photo.width + left + right, photo.height + top + bottom), colour)
    image.paste(photo, (left, top))
    return image


@pytest.mark.parametrize("colour", ["black", "white", (40, 90, 160)])
@pytest.mark.parametrize(
    "bars",
    [dict(top=40, bottom=37), dict(left=25, right=30), dict(bottom=12), dict(top=20, bottom=20, left=9, right=9)],
)
def test_bars_are_measured(bars, colour):
    assert find_bars(framed(colour, **bars)) == bars


def test_after_jpeg_and_with_a_phones_icons(tmp_path):
    image = framed("black", top=60, bottom=60)
    draw = ImageDraw.Draw(image)
    draw.text((4, 10), "12:45", fill="white")
    draw.rectangle((100, 12, 112, 18), fill="white")
    image.save(tmp_path / "a.jpg", quality=92, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as saved:
        found = find_bars(saved)
    assert found.keys() == {"top", "bottom"}
    assert found["top"] == pytest.approx(60, abs=2) and found["bottom"] == pytest.approx(60, abs=2)


def test_a_plain_background_is_no_bar():
    image = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(image).ellipse((60, 40, 240, 170), fill="red")
    assert find_bars(image) == {}
    assert find_bars(Image.new("RGB", (300, 200), "white")) == {}
    assert find_bars(noise()) == {}


def test_a_picture_of_one_pixel():
    assert find_bars(Image.new("RGB", (1, 1))) == {}
