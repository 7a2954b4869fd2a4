"""The comparison sheet: photos on top, then one row of images a model, one column a seed."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

BACKGROUND, BLANK, INK, MUTED = (250, 250, 247), (238, 238, 233), (28, 30, 33), (118, 120, 124)
MARGIN, GAP, LABEL_WIDTH = 36, 10, 156
HEADER_HEIGHT = 34  # the line above a row: file names, seeds
TITLE_SIZE, LABEL_SIZE, SMALL_SIZE = 26, 20, 15
TITLE_LINE, SUBTITLE_LINE = 34, 26
MIN_WIDTH = 640
LARGEST_PHOTO = 1024  # pixels; a sheet shows no more

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Row(NamedTuple):
    """Images side by side, and what stands above each; a row without captions has the same as the row above."""

    label: str
    note: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


class Layout(NamedTuple):
    """In pixels: the sheet's size, a cell's side, left edges by column, upper edges by row."""

    size: tuple[int, int]
    cell: int
    lefts: list[int]
    tops: list[int]


def plan(rows: Sequence[Row]) -> Layout:
    """Where everything is. A cell is 256 pixels, less if many columns would make the sheet unwieldy."""
    num_columns = max(len(row.images) for row in rows)
    cell = 256 if num_columns <= 8 else max(128, 2048 // num_columns)
    lefts = [MARGIN + LABEL_WIDTH + column * (cell + GAP) for column in range(num_columns)]
    tops, top = [], MARGIN + TITLE_LINE + SUBTITLE_LINE
    for row in rows:
        top += HEADER_HEIGHT if row.captions else 0
        tops.append(top)
        top += cell + GAP
    return Layout((max(MIN_WIDTH, lefts[-1] + cell + MARGIN), top - GAP + MARGIN), cell, lefts, tops)


def make_comparison(title: str, subtitle: str, rows: Sequence[Row]) -> Image.Image:
    """Draws the sheet; an image that is not square is centred in its cell."""
    layout = plan(rows)
    sheet = Image.new("RGB", layout.size, BACKGROUND)
    draw, width, side = ImageDraw.Draw(sheet), layout.size[0] - 2 * MARGIN, layout.cell

    def write(place: tuple[int, int], text: str, color: tuple, size: int, anchor: str, width: float) -> None:
        font = ImageFont.load_default(size)  # Latin
        draw.text(place, cut(text, font, width), color, font, anchor=anchor)

    write((MARGIN, MARGIN), title, INK, TITLE_SIZE, "la", width)
    write((MARGIN, MARGIN + TITLE_LINE + 4), subtitle, MUTED, SMALL_SIZE, "la", width)
    for row, top in zip(rows, layout.tops, strict=True):
        write((MARGIN, top + side // 2), row.label, INK, LABEL_SIZE, "ls", LABEL_WIDTH - GAP)
        write((MARGIN, top + side // 2 + 8), row.note, MUTED, SMALL_SIZE, "la", LABEL_WIDTH - GAP)
        for column, left in enumerate(layout.lefts):
            draw.rectangle((left, top, left + side - 1, top + side - 1), BLANK)
            if column < len(row.captions):
                write((left + side // 2, top - 8), row.captions[column], MUTED, SMALL_SIZE, "ms", side)
            if column < len(row.images):
                image = ImageOps.contain(row.images[column], (side, side), Image.Resampling.LANCZOS)
                sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    return sheet


def cut(text: str, font: Font, width: float) -> str:
    """One line of at most `width` pixels; what does not fit ends in an ellipsis."""
    line = " ".join("".join(" " if unicodedata.category(char)[0] == "C" else char for char in text).split())
    if font.getlength(line) <= width:
        return line
    fits = (line[:end].rstrip() + "..." for end in range(min(len(line), round(width)), 0, -1))
    return next((shorter for shorter in fits if font.getlength(shorter) <= width), "...")


def square(photo: Image.Image) -> Image.Image:
    """The centre of an upright RGB photo as a square."""
    side = min(*photo.size, LARGEST_PHOTO)
    return ImageOps.fit(photo, (side, side), Image.Resampling.LANCZOS)
