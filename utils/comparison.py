"""The comparison sheet: photos on top, then one row of images a model, one column a seed."""

import unicodedata
from pathlib import Path
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
SUBTITLE_LINE = 26
MIN_WIDTH = 640
LARGEST_PHOTO = 1024  # pixels; a sheet shows no more


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
    """Side of a cell in pixels: 256, less where many columns would make the sheet unwieldy."""
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
    title_lines = wrap(title, ImageFont.load_default(TITLE_SIZE), title_width, MAX_TITLE_LINES)
    sheet = _Sheet(plan(num_columns, len(rows), len(title_lines), photos is not None))
    sheet.title(title_lines, subtitle)
    if photos is not None:
        note = f"{num_columns} of {len(photos)}" if len(photos) > num_columns else ""
        shown = [*photos, *[("", None)] * num_columns][:num_columns]
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
        self.title_font, self.label_font, self.small_font = map(ImageFont.load_default, (TITLE_SIZE, 20, 15))

    def title(self, lines: list[str], subtitle: str) -> None:
        for number, line in enumerate(lines):
            self.draw.text((MARGIN, MARGIN + number * TITLE_LINE), line, INK, self.title_font, anchor="la")
        subtitle = ellipsise(subtitle, self.small_font, self.layout.width - 2 * MARGIN)
        top = MARGIN + len(lines) * TITLE_LINE + 4
        self.draw.text((MARGIN, top), subtitle, MUTED, self.small_font, anchor="la")

    def header(self, top: int, texts: list[str]) -> None:
        for left, text in zip(self.layout.column_left, texts, strict=True):
            place = (left + self.layout.cell // 2, top + HEADER_HEIGHT - 8)
            text = ellipsise(text, self.small_font, self.layout.cell)
            self.draw.text(place, text, MUTED, self.small_font, anchor="ms")

    def row(self, top: int, label: str, note: str, images: list[Image.Image | None]) -> None:
        """A row of cells; an image that is not square is centred in its cell, and None leaves the cell blank."""
        cell = self.layout.cell
        note = ellipsise(note, self.small_font, LABEL_WIDTH - GAP)
        self.draw.text((MARGIN, top + cell // 2), label, INK, self.label_font, anchor="ls")
        self.draw.text((MARGIN, top + cell // 2 + 8), note, MUTED, self.small_font, anchor="la")
        for left, image in zip(self.layout.column_left, images, strict=True):
            self.draw.rectangle((left, top, left + cell - 1, top + cell - 1), BLANK)
            if image is not None:
                image = fit(image, cell)
                self.image.paste(image, (left + (cell - image.width) // 2, top + (cell - image.height) // 2))


def load_photos(folder: Path) -> list[tuple[str, Image.Image]]:
    """(file name, square RGB image) of every picture in `folder`, by name; hidden and other files are passed over."""
    photos = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            with Image.open(path) as image:
                photos.append((path.name, square(image)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return photos


def square(photo: Image.Image) -> Image.Image:
    """The photo's centre as a square RGB image, upright by its EXIF orientation, transparency on white."""
    photo.draft("RGB", (LARGEST_PHOTO, LARGEST_PHOTO))
    photo = ImageOps.exif_transpose(photo)
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    side = min(photo.size)
    return ImageOps.fit(photo.convert("RGB"), (min(side, LARGEST_PHOTO),) * 2, Image.Resampling.LANCZOS)


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image scaled to `side` pixels on its longer side."""
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    if size == image.size:
        return image
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


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


def ellipsise(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut to `width` pixels with an ellipsis where it is longer."""
    text = displayable(text, font)
    if font.getlength(text) <= width:
        return text
    return text[: _num_fitting(text, font, width - font.getlength("..."))].rstrip() + "..."


def displayable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """One line without control characters; a letter whose accent the font lacks loses the accent."""
    text = " ".join("".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text).split())
    missing = bytes(font.getmask("\uffff"))
    return "".join(_base_letter(char) if bytes(font.getmask(char)) == missing else char for char in text)


def _base_letter(char: str) -> str:
    base = "".join(part for part in unicodedata.normalize("NFKD", char) if not unicodedata.combining(part))
    return base if base.isascii() and base else char


def _num_fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many leading characters fit into `width` pixels: at least 1."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
