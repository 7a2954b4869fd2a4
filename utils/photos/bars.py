"""Bars of one colour along a photo's edges, as around a photo in a screenshot."""

import numpy as np
from PIL import Image

TOLERANCE = 8  # of 255: what JPEG does to one colour
IN_THE_BAR, IN_THE_PHOTO = 0.7, 0.4  # at least, and at most, so much of a row has the bar's colour
PURE = 0.97  # so much at least of the rows next to the photo, where no phone shows anything
TRANSITION = 5  # rows from a pure one to the photo: JPEG blurs a bar's end by these, other edges are less straight
NARROWEST = 0.01  # of the side
NUM_SAMPLES = 256  # pixels of a row that are looked at


def find_bars(image: Image.Image) -> dict[str, int]:
    """Pixels of bar at "top", "bottom", "left" and "right" of an RGB image, those that have one.

    A row belongs to a bar if most of it has one colour, that of the edge: icons of a phone may lie in it. Next to
    the photo it must have that colour alone and change within a few rows, all along, so that neither the plain
    background of a subject nor a dark table is one.
    """
    pixels = np.asarray(image)
    found = dict(top=_thickness(pixels), bottom=_thickness(pixels[::-1]))
    between = pixels[found["top"] : len(pixels) - found["bottom"]].swapaxes(0, 1)
    found |= dict(left=_thickness(between), right=_thickness(between[::-1]))
    return {side: thickness for side, thickness in found.items() if thickness}


def _thickness(rows: np.ndarray) -> int:
    """Rows of bar at the beginning of uint8 [H,W,3]; 0 if there is none."""
    rows = rows[:, :: max(1, rows.shape[1] // NUM_SAMPLES)]
    colour = np.median(rows[0], axis=0)

    def share(row: int) -> float:
        return float((np.abs(rows[row] - colour).max(axis=1) <= TOLERANCE).mean())

    height = len(rows)
    end = next((row for row in range(height) if share(row) < IN_THE_BAR), height)
    if end < max(3, NARROWEST * height) or end == height:
        return 0
    last_rows = range(max(0, end - TRANSITION), end)
    ends_sharply = any(
        share(row) >= PURE and share(min(row + TRANSITION, height - 1)) <= IN_THE_PHOTO for row in last_rows
    )
    return end if ends_sharply else 0
