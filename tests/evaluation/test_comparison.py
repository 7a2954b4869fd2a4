"""The comparison sheet: every image is where the layout says, and text of any script breaks nothing."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from utils.dataset import InstanceDataset
from utils.evaluation.comparison import (
    BACKGROUND,
    BLANK,
    Row,
    cut,
    make_comparison,
    plan,
    square,
)
from utils.evaluation.photos import load_photos

RED, GREEN, BLUE, GRAY, PINK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90), (250, 20, 200)
OWN = ImageFont.load_default(20)


def plain(color, size=(64, 64)):
    return Image.new("RGB", size, color)


def cell_color(sheet, layout, column, top):
    """The colour of a cell of one colour; fails where it has two."""
    left = layout.lefts[column]
    cell = sheet.crop((left, top, left + layout.cell, top + layout.cell))
    extrema = cell.getextrema()
    assert all(low == high for low, high in extrema), extrema
    return tuple(low for low, _ in extrema)


def test_each_row_and_column_has_its_place():
    rows = [
        Row("your photos", "", [plain(PINK, (300, 300))], ["photo 1"]),
        Row("baseline", "sd", [plain(RED), plain(GREEN)], ["seed 7", "seed 8"]),
        Row("fine-tuned", "output", [plain(BLUE), plain(GRAY)]),
    ]
    sheet, layout = make_comparison("a cat", "", rows), plan(rows)
    assert sheet.size == layout.size and layout.tops == sorted(layout.tops)
    cells = [cell_color(sheet, layout, column, top) for top in layout.tops for column in (0, 1)]
    assert cells == [PINK, BLANK, RED, GREEN, BLUE, GRAY]  # fewer photos than columns
    assert sheet.getpixel((layout.lefts[0] - 1, layout.tops[1])) == BACKGROUND
    assert sheet.getpixel((layout.lefts[0], layout.tops[2] - 1)) == BACKGROUND


def has_ink(sheet, box):
    return any(low < 200 for low, _ in sheet.crop(box).getextrema())


def test_labels_captions_title_and_subtitle_are_written_beside_the_cells():
    rows = [Row("your photos", "", [plain(RED)], ["photo 1"]), Row("baseline", "sd", [plain(RED)], ["seed 0"])]
    sheet, layout = make_comparison("a cat", "steps", rows), plan(rows)
    left = layout.lefts[0]
    for top in layout.tops:
        assert has_ink(sheet, (0, top, left, top + layout.cell))
        assert has_ink(sheet, (left, top - 34, left + layout.cell, top))
    assert has_ink(sheet, (0, 0, layout.size[0], layout.tops[0] - 34))


def test_an_image_that_is_not_square_is_centred():
    rows = [Row("baseline", "", [plain(RED, (64, 32))])]
    sheet, layout = make_comparison("a cat", "", rows), plan(rows)
    left, top, cell = layout.lefts[0], layout.tops[0], layout.cell
    assert sheet.getpixel((left + cell // 2, top + cell // 2)) == RED
    assert sheet.getpixel((left + cell // 2, top + 5)) == BLANK


@pytest.mark.parametrize("num_columns", [1, 4, 8, 9, 40])
def test_the_sheet_holds_its_columns_side_by_side(num_columns):
    layout = plan([Row("", "", [plain(RED)] * num_columns)])
    steps = {b - a for a, b in zip(layout.lefts, layout.lefts[1:], strict=False)}
    assert all(step > layout.cell for step in steps)
    assert layout.lefts[-1] + layout.cell < layout.size[0]
    assert layout.cell >= 128


def test_photos_are_sorted_and_what_is_no_photo_is_left_out(tmp_path):
    plain(BLUE).save(tmp_path / "b.png")
    plain(RED).save(tmp_path / "a.png")
    plain(RED).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in load_photos(tmp_path)] == ["a.png", "b.png"]
    assert load_photos(None) == load_photos(tmp_path / "missing") == {}


def test_the_centre_of_a_photo_is_shown():
    photo = plain(RED, (300, 100))
    photo.paste(GREEN, (100, 0, 200, 100))
    assert square(photo).size == (100, 100)
    assert square(photo).getextrema() == tuple((value, value) for value in GREEN)


def test_a_16_bit_photo_is_the_same_in_training_in_scoring_and_on_the_sheet(tmp_path):
    """Pillow's own conversion makes a white square of it."""
    values = np.linspace(20_000, 40_000, 64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "grey.png")
    (photo,) = load_photos(tmp_path).values()  # what score embeds
    trained_on = InstanceDataset(tmp_path, 64).photos[0].pixels
    assert np.asarray(photo).mean() == pytest.approx(30_000 / 257, abs=0.5) == trained_on.mean()
    assert np.asarray(square(photo)).mean() == trained_on.mean()


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "фото кота", "猫の写真", "قطة", "🐈‍⬛", "a\nb\tc\0d\u202e", "e\u0301" * 200, "x" * 5000, "word " * 900],
)
def test_no_prompt_breaks_the_sheet(prompt):
    rows = [Row(prompt, prompt, [plain(RED)], [prompt])]
    assert make_comparison(prompt, prompt, rows).width == plan(rows).size[0]


@pytest.mark.parametrize("text", ["x" * 400, "word " * 900, "one two three four five six seven eight"])
def test_long_text_is_cut_with_an_ellipsis(text):
    line = cut(text, OWN, 150)
    assert line.endswith("...") and text.startswith(line[:-3]) and 130 < OWN.getlength(line) <= 150
    assert cut("short", OWN, 150) == "short" and cut("a\nb\tc\0d\u202e", OWN, 150) == "a b c d"
