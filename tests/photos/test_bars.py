"""Bars along a photo's edges: how thick they are, what is none, and a photo without them."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from utils import PROGRAM
from utils.dataset import InstanceDataset
from utils.evaluation.photos import load_photos
from utils.photos.decoding import decode, find_bars

SIDES = ("top", "bottom", "left", "right")


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


@pytest.mark.parametrize("bars", [dict(top=40, bottom=37), dict(left=25), dict(top=20, bottom=20, left=9, right=9)])
def test_they_are_cut_off(tmp_path, bars):
    framed("black", **bars).save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png", crop_bars=True), noise())
    (photo,) = InstanceDataset(tmp_path, 90, crop_bars=True).photos
    assert np.array_equal(photo.pixels, np.asarray(noise()).transpose(2, 0, 1)) and photo.original_size == (120, 90)
    said = ", ".join(f"{side} {bars[side]}" for side in SIDES if side in bars)
    assert photo.done[-1] == f"bars cut off ({said} pixels)"


def test_without_the_flag_they_stay_and_what_is_transparent_is_no_bar(tmp_path):
    framed("black", top=40).save(tmp_path / "a.png")
    cut_out = framed("black", top=40)
    cut_out.putalpha(Image.linear_gradient("L").resize(cut_out.size))
    cut_out.save(tmp_path / "b.png")
    for crop_bars, sizes in ((False, [(120, 130), (120, 130)]), (True, [(120, 90), (120, 130)])):
        dataset = InstanceDataset(tmp_path, 90, crop_bars=crop_bars)
        assert [photo.original_size for photo in dataset.photos] == sizes


def test_the_evaluation_sees_what_was_trained_on(tmp_path):
    (photos := tmp_path / "photos").mkdir()
    framed("black", top=40).save(photos / "a.png")
    for crop_bars, size in ((True, (120, 90)), (False, (120, 130))):
        (tmp_path / "run.json").write_text(json.dumps(dict(program=PROGRAM, arguments=dict(crop_bars=crop_bars))))
        assert [photo.size for photo in load_photos(photos, tmp_path).values()] == [size]


def test_a_picture_of_one_pixel():
    assert find_bars(Image.new("RGB", (1, 1))) == {}
