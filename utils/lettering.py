"""Text on a picture: a font that has its letters, lines that fit, and what no font has spelled out."""

import functools
import unicodedata

from PIL import ImageFont, features

# Searched for where the system keeps its fonts when Pillow's own, which is Latin, does not have every letter.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "FreeSans.ttf", "segoeui.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc"),
    *("wqy-zenhei.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "Arial Unicode.ttf", "Hiragino Sans GB.ttc"),
    *("NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "Nirmala.ttf", "arial.ttf"),
)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's font, or the system's font that lacks fewer letters of `text`."""
    letters = set(one_line(text)) - {" "}
    best = ImageFont.load_default(size)
    num_missing = sum(not has_letter(best, letter) for letter in letters)
    for name in SYSTEM_FONTS:
        if not num_missing:
            break
        font = _system_font(name, size)
        missing = num_missing if font is None else sum(not has_letter(font, letter) for letter in letters)
        if missing < num_missing:
            best, num_missing = font, missing
    return best


def has_letter(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether the font draws this letter as itself, and in its script's direction."""
    if unicodedata.bidirectional(letter) in ("R", "AL") and not features.check("raqm"):
        return False  # would be written from left to right
    return bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces where possible; what does not fit ends in an ellipsis."""
    rest = displayable(text, font)
    lines = []
    while len(lines) < max_lines - 1 and font.getlength(rest) > width:
        end = _num_fitting(rest, font, width)
        end = rest.rfind(" ", 1, end + 1) if " " in rest[1 : end + 1] else end
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return [*lines, ellipsise(rest, font, width)]


def ellipsise(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut to `width` pixels with an ellipsis where it is longer."""
    text = displayable(text, font)
    if font.getlength(text) <= width:
        return text
    return text[: _num_fitting(text, font, width - font.getlength("..."))].rstrip() + "..."


def one_line(text: str) -> str:
    """The text with accents joined to their letters, a single space for whatever is blank or invisible."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text).split())


def displayable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """One line in which every letter is one that the font has: less its accent, else its number, as \\u732b."""
    return "".join(char if char == " " or has_letter(font, char) else _substitute(char) for char in one_line(text))


def _substitute(char: str) -> str:
    if unicodedata.combining(char) or unicodedata.category(char) == "Mn":
        return ""
    base = "".join(part for part in unicodedata.normalize("NFKD", char) if not unicodedata.combining(part))
    return base if base.isascii() and base else char.encode("ascii", "backslashreplace").decode()


@functools.cache
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _num_fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many leading characters fit into `width` pixels: at least 1."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
