"""Text of any script is written in a font that has it, or spelled out where there is none."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from utils import lettering
from utils.lettering import displayable, ellipsise, font_for, has_letter, one_line, wrap

OWN = ImageFont.load_default(size=20)
HAS_DEJAVU = lettering._system_font("DejaVuSans.ttf", 20) is not None


@pytest.fixture
def no_system_fonts(monkeypatch):
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ())


def drawn(text: str, font) -> np.ndarray:
    image = Image.new("L", (400, 60))
    ImageDraw.Draw(image).text((4, 4), text, 255, font)
    return np.asarray(image)


def test_latin_is_written_in_pillows_font():
    assert font_for("a photo of my cat, 50 steps (7.5)", 20).getname() == OWN.getname()


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("кот", r"\u043a\u043e\u0442"),
        ("a 猫!", r"a \u732b!"),
        ("🐈", r"\U0001f408"),
        ("🐈\ufe0f a", r"\U0001f408 a"),
        ("a\nb\tc\0d\u202e", "a b c d"),
    ],
)
def test_what_no_font_has_is_spelled_out(no_system_fonts, text, spelled):
    assert displayable(text, font_for(text, 20)) == spelled


@pytest.mark.skipif(not HAS_DEJAVU, reason="needs the font DejaVu Sans")
@pytest.mark.parametrize("text", ["фото кота", "φωτογραφία"])
def test_a_system_font_writes_it_where_there_is_one(text):
    font = font_for(text, 20)
    assert font.getname() != OWN.getname()
    assert displayable(text, font) == text
    assert len({drawn(letter, font).tobytes() for letter in set(text)}) == len(set(text))  # no two boxes


@pytest.mark.skipif(not HAS_DEJAVU, reason="needs the font DejaVu Sans")
def test_the_rest_is_spelled_out_beside_what_a_system_font_has(monkeypatch):
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ("no-such-font.ttf", "DejaVuSans.ttf"))
    assert displayable("кот 猫", font_for("кот 猫", 20)) == r"кот \u732b"


@pytest.mark.skipif(not HAS_DEJAVU, reason="needs the font DejaVu Sans")
@pytest.mark.parametrize("has_raqm", [True, False])
def test_a_script_from_right_to_left_needs_a_layout_engine(monkeypatch, has_raqm):
    monkeypatch.setattr(lettering.features, "check", lambda _name: has_raqm)
    font = lettering._system_font("DejaVuSans.ttf", 20)
    assert has_letter(font, "\u0642") == has_raqm
    assert displayable("\u0642", font) == ("\u0642" if has_raqm else r"\u0642")


def test_long_text_is_wrapped_at_spaces_then_cut_with_an_ellipsis():
    text = "one two three four five six seven eight nine ten"
    lines = wrap(text, OWN, 150, 10)
    assert " ".join(lines) == text
    assert all(OWN.getlength(line) <= 150 for line in lines)
    short = wrap(text, OWN, 150, 2)
    assert len(short) == 2 and short[-1].endswith("...")
    assert all(OWN.getlength(line) <= 150 for line in wrap("x" * 400, OWN, 150, 3))
    assert ellipsise("short", OWN, 150) == "short"
    assert OWN.getlength(ellipsise("y" * 100, OWN, 150)) <= 150


def test_an_accent_that_the_font_lacks_is_dropped_not_the_letter():
    assert ellipsise("café", OWN, 500) in ("café", "cafe")
    assert one_line("cafe\u0301") == "café"
