"""Copies of made-up photos are found; pictures with the same thing in them are no copies."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from bench import near_duplicates as bench
from utils.evaluation.near_duplicates import COPY, nearest, prepare


def photo(seed: int, size: tuple[int, int] = (300, 300)) -> Image.Image:
    """Shapes of every scale."""
    draws, levels = np.random.default_rng(seed), np.zeros((size[1], size[0]))
    for cells in (4, 8, 16):
        noise = Image.fromarray(draws.normal(128, 128 / cells**0.5, (cells, cells)).astype(np.float32))
        levels += np.asarray(noise.resize(size, Image.Resampling.BICUBIC)) / 3
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")


def with_subject(seed: int) -> Image.Image:
    """The same thing, a third of the picture wide, in another place before another background."""
    draws, picture = random.Random(seed), photo(seed)
    picture.paste(photo(1000, (110, 110)), (draws.randint(0, 190), draws.randint(0, 190)))
    return picture


PHOTOS = [photo(seed) for seed in range(5)]


def test_altered_copies_are_found_and_lead_to_their_photo():
    draws = random.Random(0)
    copies = [bench.altered(each, draws) for each in PHOTOS * 4]
    index, sameness = nearest(prepare(copies), prepare(PHOTOS))
    assert index.tolist() == [*range(5)] * 4 and (sameness >= COPY).mean() >= 0.95


@pytest.mark.parametrize("corner", [(0, 0), (30, 0), (0, 30), (30, 30), (15, 15)])
@pytest.mark.parametrize(("mirror", "blur"), [(False, 0.7), (True, 0.7), (False, 2), (True, 2)])
def test_a_crop_of_a_tenth_is_a_copy_whichever_corner_is_left_and_if_it_is_blurred(corner, mirror, blur):
    left, top = corner
    crop = PHOTOS[2].crop((left, top, left + 270, top + 270)).resize((64, 64), Image.Resampling.LANCZOS)
    crop = (ImageOps.mirror(crop) if mirror else crop).filter(ImageFilter.GaussianBlur(blur))
    (index,), (sameness,) = nearest(prepare([crop]), prepare(PHOTOS))
    assert index == 2 and COPY <= sameness <= 1.001
    (back,) = nearest(prepare([PHOTOS[2]]), prepare([crop]))[1]
    assert back == pytest.approx(sameness, abs=1e-5)


def test_the_same_thing_in_another_place_is_no_copy():
    subject = [with_subject(seed) for seed in range(2000, 2012)]
    for number, picture in enumerate(subject):
        assert nearest(prepare([picture]), prepare(subject[:number] + subject[number + 1 :]))[1][0] < COPY


@pytest.mark.parametrize("colour", [0, 128, 255])
def test_an_empty_picture_copies_nothing_not_even_another(colour):
    empty = Image.new("RGB", (64, 64), (colour,) * 3)
    assert nearest(prepare([empty]), prepare([*PHOTOS, empty]))[1][0] < 0.3


@pytest.mark.parametrize("size", [(400, 300), (300, 450)])
@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_any_square_of_an_oblong_photo_can_be_copied(size, where):
    oblong = photo(7, size)
    left, top = (round(where * (side - 300)) for side in size)
    square = oblong.crop((left, top, left + 300, top + 300)).resize((64, 64), Image.Resampling.LANCZOS)
    index, sameness = nearest(prepare([PHOTOS[0], square]), prepare([*PHOTOS, oblong]))
    assert index.tolist() == [0, 5] and (sameness >= COPY).all()


def test_the_bench_prints_a_line_for_copies_and_two_for_other_photos(tmp_path, capsys):
    for number in range(3):
        PHOTOS[number].save(tmp_path / f"{number}.jpg")
    bench.main([str(tmp_path)])
    copies, others, altered = capsys.readouterr().out.splitlines()
    assert copies.startswith("copies: 3 of 3 ")
    assert others.startswith("other photos: 0 of 3 ") and altered.startswith("other photos, altered: 0 of 3 ")
