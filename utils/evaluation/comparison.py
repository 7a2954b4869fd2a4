"""The comparison sheet: photos on top, then one row of images a model, one column a seed."""

import functools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

BACKGROUND = (250, 250, 247)
BLANK = (238, 238, 233)
INK = (28, 30, 33)
MUTED = (118, 120, 124)

MARGIN = 36
GAP = 10
LABEL_WIDTH = 156
HEADER_HEIGHT = 34  # the line above a block of cells: file names, seeds
BLOCK_GAP = 22
TITLE_SIZE, TITLE_LINE, MAX_TITLE_LINES = 26, 34, 3
LABEL_SIZE, SMALL_SIZE = 20, 15
SUBTITLE_LINE = 26
MIN_WIDTH = 640
LARGEST_PHOTO = 1024  # pixels; a sheet shows no more

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Row(NamedTuple):
    """One model's images, in seed order."""

    label: str
    note: str
    images: list[Image.Image]


class Layout(NamedTuple):
    """Where things are, in pixels: a cell's left edge by column, the upper edges of the photos and of each row."""

    width: int
    height: int
    cell: int
    column_left: list[int]
    photo_top: int | None
    header_top: int
    row_top: list[int]


def cell_size(num_columns: int) -> int:
    """Side of a cell in pixels: 256, less if many columns would make the sheet unwieldy."""
    return 256 if num_columns <= 8 else max(128, 2048 // num_columns)


def plan(num_columns: int, num_rows: int, num_title_lines: int, with_photos: bool) -> Layout:
    """The sheet's layout, from what is on it."""
    cell = cell_size(num_columns)
    column_left = [MARGIN + LABEL_WIDTH + column * (cell + GAP) for column in range(num_columns)]
    top = MARGIN + num_title_lines * TITLE_LINE + SUBTITLE_LINE + BLOCK_GAP // 2
    photo_top = None
    if with_photos:
        photo_top = top + HEADER_HEIGHT
        top = photo_top + cell + BLOCK_GAP
    row_top = [top + HEADER_HEIGHT + row * (cell + GAP) for row in range(num_rows)]
    return Layout(
        width=max(MIN_WIDTH, column_left[-1] + cell + MARGIN),
        height=row_top[-1] + cell + MARGIN,
        cell=cell,
        column_left=column_left,
        photo_top=photo_top,
        header_top=top,
        row_top=row_top,
    )


def make_comparison(
    title: str,
    subtitle: str,
    seeds: list[int],
    rows: list[Row],
    photos: list[tuple[str, Image.Image]] | None = None,
) -> Image.Image:
    """Draws the sheet. `photos` are (file name, image): the first len(seeds) are shown; None leaves their row out."""
    num_columns = len(seeds)
    title_width = plan(num_columns, len(rows), 1, False).width - 2 * MARGIN
    title_lines = wrap(title, own_font(TITLE_SIZE), title_width, MAX_TITLE_LINES)
    sheet = _Sheet(plan(num_columns, len(rows), len(title_lines), photos is not None))
    sheet.title(title_lines, subtitle)
    if photos is not None:
        note = f"{num_columns} of {len(photos)}" if len(photos) > num_columns else ""
        blanks: list[tuple[str, Image.Image | None]] = [("", None)] * num_columns
        shown = [*photos, *blanks][:num_columns]
        assert sheet.layout.photo_top is not None
        sheet.header(sheet.layout.photo_top - HEADER_HEIGHT, [name for name, _ in shown])
        sheet.row(sheet.layout.photo_top, "your photos", note, [photo for _, photo in shown])
    sheet.header(sheet.layout.header_top, [f"seed {seed}" for seed in seeds])
    for row, top in zip(rows, sheet.layout.row_top, strict=True):
        sheet.row(top, row.label, row.note, row.images)
    return sheet.image


class _Sheet:
    """An empty sheet, and the parts that are drawn on it."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.image = Image.new("RGB", (layout.width, layout.height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, place: tuple[int, int], text: str, color: tuple, size: int, anchor: str, width: float) -> None:
        """A line of at most `width` pixels."""
        font = own_font(size)
        self.draw.text(place, wrap(text, font, width)[0], color, font, anchor=anchor)

    def title(self, lines: list[str], subtitle: str) -> None:
        for number, line in enumerate(lines):
            self.draw.text((MARGIN, MARGIN + number * TITLE_LINE), line, INK, own_font(TITLE_SIZE), anchor="la")
        top = MARGIN + len(lines) * TITLE_LINE + 4
        self.text((MARGIN, top), subtitle, MUTED, SMALL_SIZE, "la", self.layout.width - 2 * MARGIN)

    def header(self, top: int, texts: list[str]) -> None:
        for left, text in zip(self.layout.column_left, texts, strict=True):
            place = (left + self.layout.cell // 2, top + HEADER_HEIGHT - 8)
            self.text(place, text, MUTED, SMALL_SIZE, "ms", self.layout.cell)

    def row(self, top: int, label: str, note: str, images: Sequence[Image.Image | None]) -> None:
        """A row of cells; an image that is not square is centred in its cell, and None leaves the cell blank."""
        cell, width = self.layout.cell, LABEL_WIDTH - GAP
        self.text((MARGIN, top + cell // 2), label, INK, LABEL_SIZE, "ls", width)
        self.text((MARGIN, top + cell // 2 + 8), note, MUTED, SMALL_SIZE, "la", width)
        for left, image in zip(self.layout.column_left, images, strict=True):
            self.draw.rectangle((left, top, left + cell - 1, top + cell - 1), BLANK)
            if image is not None:
                image = fit(image, cell)
                self.image.paste(image, (left + (cell - image.width) // 2, top + (cell - image.height) // 2))


def one_line(text: str) -> str:
    """The text with accents joined to their letters, a single space for whatever is blank or invisible."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text).split())


@functools.cache
def own_font(size: int) -> Font:
    """Pillow's own, which is Latin."""
    return ImageFont.load_default(size)


def has_letter(font: Font, letter: str) -> bool:
    """Whether the font draws this letter as itself, and not as the box of what it lacks."""
    return bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def displayable(text: str, font: Font) -> str:
    """One line of letters that the font has: what it lacks loses its accent, or is its number, as \\u732b."""

    def drawn(letter: str) -> str:
        plain = unicodedata.normalize("NFD", letter)[0]
        spelled = letter.encode("ascii", "backslashreplace").decode()
        return next((form for form in (letter, plain) if has_letter(font, form)), spelled)

    return "".join(drawn(letter) for letter in one_line(text))


def wrap(text: str, font: Font, width: float, max_lines: int = 1) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces if possible; what does not fit ends in an ellipsis."""
    rest = displayable(text, font)
    lines: list[str] = []
    while font.getlength(rest) > width and len(lines) < max_lines - 1:
        line = _beginning(rest, font, width)
        if " " in line and not rest.startswith(" ", len(line)):
            line = line[: line.rindex(" ")]
        lines.append(line.rstrip())
        rest = rest[len(line) :].lstrip()
    if font.getlength(rest) > width:
        rest = _beginning(rest, font, width - font.getlength("...")).rstrip() + "..."
    return [*lines, rest]


def _beginning(text: str, font: Font, width: float) -> str:
    """As many letters as fit into `width` pixels, at least one."""
    for end in range(1, len(text)):
        if font.getlength(text[: end + 1]) > width:
            return text[:end]
    return text


def square(photo: Image.Image) -> Image.Image:
    """The centre of an upright RGB photo as a square."""
    side = min(*photo.size, LARGEST_PHOTO)
    return ImageOps.fit(photo, (side, side), Image.Resampling.LANCZOS)


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image scaled to `side` pixels on its longer side."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    size = (width, height)
    if size == image.size:
        return image
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
