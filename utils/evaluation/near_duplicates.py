"""Whether a picture is one of the photos again, perhaps mirrored, cropped by a tenth, blurred, a little lighter.

No learned encoder: the largest normalised cross-correlation (Lewis, Fast Normalized Cross-Correlation, 1995) of the
middle of one with any place of the other, both as small grey pictures without their slow changes of brightness.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

SIDE = 48  # pixels, after which a picture's 64 or 512 and how hard it was compressed no longer matter
FINE, COARSE = 1, 3  # pixels: finer than one is gone with half a pixel's shift, coarser than three is light
MIDDLE = 0.8  # of the side: what is looked for in the other picture
ZOOMS = (0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12)
SIZES = [round(round(SIDE * zoom) * MIDDLE) for zoom in ZOOMS]  # of the middles, pixels
LEAST_CONTRAST = 1.0  # levels of 255: what is flatter is like nothing
COPY = 0.86
"""The least sameness of a copy. bench/near_duplicates.py, 132 photos of 25 subjects: of their copies all are found; of
the photos, each left out once, 3.0% are called copies of another of their subject (altered as copies are, 4.5%)."""


class Greys(NamedTuple):
    """Pictures prepared for the comparison, a row a square of one of them.

    Attributes:
        owners: [S], the picture that a square was cut from.
        wholes: [S,SIDE,SIDE/2+1], the squares' Fourier transforms.
        deviations: [S,Z,SIDE,SIDE], of the places of each size, by their upper left corner; inf where none fits.
        middles: [S,2,Z,SIDE,SIDE/2+1], conjugate transforms of the middles at every zoom, as they are and mirrored.
    """

    owners: np.ndarray
    wholes: np.ndarray
    deviations: np.ndarray
    middles: np.ndarray


def prepare(pictures: Sequence[Image.Image]) -> Greys:
    """Pictures of any sizes; an oblong one as overlapping squares, since any of them may have been trained on."""
    squares = [(owner, square) for owner, picture in enumerate(pictures) for square in _squares(picture)]
    wholes = np.stack([_grey(square, SIDE) for _, square in squares])
    middles = np.zeros((len(squares), 2, len(ZOOMS), SIDE, SIDE), np.float32)
    for row, (_, square) in enumerate(squares):
        for number, (zoom, size) in enumerate(zip(ZOOMS, SIZES, strict=True)):
            middle = _middle(_grey(square, round(SIDE * zoom)), size)
            middles[row, 0, number, :size, :size] = middle
            middles[row, 1, number, :size, :size] = middle[:, ::-1]
    deviations = np.stack([_deviations(wholes, size) for size in SIZES], axis=1)
    owners = np.array([owner for owner, _ in squares])
    return Greys(owners, np.fft.rfft2(wholes), deviations, np.fft.rfft2(middles).conj())


def nearest(pictures: Greys, photos: Greys) -> tuple[np.ndarray, np.ndarray]:
    """For each picture the photo that it is most like, and how much: at most 1; COPY or more is a copy."""
    pairs = np.full((pictures.owners[-1] + 1, photos.owners[-1] + 1), -1.0)
    for row, owner in enumerate(pictures.owners):
        picture = Greys(*(part[row : row + 1] for part in pictures))
        sameness = np.maximum(_found(picture, photos)[0], _found(photos, picture)[:, 0])
        np.maximum.at(pairs[owner], photos.owners, sameness)
    best = pairs.argmax(axis=1)
    return best, pairs[np.arange(len(pairs)), best]


def _found(where: Greys, what: Greys) -> np.ndarray:
    """[S,T]: how well any middle of each square of `what` [T] is found in each square of `where` [S]."""
    products = np.fft.irfft2(where.wholes[:, None, None, None] * what.middles, (SIDE, SIDE))
    return (products / where.deviations[:, None, None]).max(axis=(2, 3, 4, 5))


def _squares(picture: Image.Image) -> list[Image.Image]:
    """The picture, small and grey; an oblong one as squares along it, at most a sixth of its short side apart."""
    scale = 4 * SIDE / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    grey, extra = picture.convert("L").resize((width, height), Image.Resampling.LANCZOS), abs(width - height)
    short, number = 4 * SIDE, 1 + math.ceil(6 * extra / (4 * SIDE))
    corners = [(int(width > height) * start, int(height > width) * start) for start in np.linspace(0, extra, number)]
    return [grey.crop((round(x), round(y), round(x) + short, round(y) + short)) for x, y in corners]


def _grey(square: Image.Image, side: int) -> np.ndarray:
    small = square.resize((side, side), Image.Resampling.LANCZOS)
    fine, coarse = (small.filter(ImageFilter.GaussianBlur(blur * side / SIDE)) for blur in (FINE, COARSE))
    return np.asarray(fine, np.float32) - np.asarray(coarse, np.float32)


def _middle(grey: np.ndarray, size: int) -> np.ndarray:
    """[size,size], with mean 0, and length 1 unless it is flat."""
    start = (len(grey) - size) // 2
    middle = grey[start : start + size, start : start + size]
    middle = middle - middle.mean()
    return middle / max(np.sqrt((middle**2).sum()), LEAST_CONTRAST * size)


def _deviations(wholes: np.ndarray, size: int) -> np.ndarray:
    """[S,SIDE,SIDE]: root of the summed squares about the mean of each place of `size` pixels; inf where none fits."""

    def sums(values: np.ndarray) -> np.ndarray:
        total = np.pad(values, ((0, 0), (1, 0), (1, 0))).cumsum(axis=1).cumsum(axis=2)
        return total[:, size:, size:] - total[:, :-size, size:] - total[:, size:, :-size] + total[:, :-size, :-size]

    wholes = wholes.astype(np.float64)
    squares = sums(wholes**2) - sums(wholes) ** 2 / size**2
    deviations = np.full(wholes.shape, np.inf, np.float32)
    places = SIDE - size + 1
    deviations[:, :places, :places] = np.sqrt(np.maximum(squares, (LEAST_CONTRAST * size) ** 2))
    return deviations
