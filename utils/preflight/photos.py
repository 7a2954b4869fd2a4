"""What the preflight table says of each photo and of the prompt."""

import warnings

import numpy as np
from PIL import Image

from utils.dataset import Photo

LARGE_PIXELS = 50_000_000
SMALL_FACTOR = 1.5  # enlarging a photo more than so is worth a note
NEAR_BITS = 6  # of the 64 of a difference hash
EXIF_ORIENTATION = 0x0112


def describe_photo(photo: Photo, resolution: int) -> tuple[str, str]:
    """Format, size and what is done to one decoded photo, and "ok" or "note"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(photo.path) as image:
            kind, mode, frames = image.format, image.mode, getattr(image, "n_frames", 1)
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            alpha = "A" in mode or "transparency" in image.info
    width, height = photo.original_size
    said, notes = [f"{kind} {width}x{height}"], []
    said += [f"turned upright (EXIF {orientation})"] if orientation in range(2, 9) else []
    said += [f"{mode} made RGB"] if mode not in ("RGB", "RGBA", "L") else []
    said += ["transparency on white"] if alpha else []
    said += [f"first of {frames} frames"] if frames > 1 else []
    factor = resolution / min(width, height)
    notes += [f"enlarged {factor:.1f} times, it will look soft"] if factor > SMALL_FACTOR else []
    notes += [f"very large ({width * height / 1e6:.0f} megapixels)"] if width * height > LARGE_PIXELS else []
    return ", ".join(said + notes), "note" if notes else "ok"


def difference_hash(pixels: np.ndarray) -> int:
    """64 bits of whether brightness grows from left to right, of uint8 [3,H,W]."""
    image = Image.fromarray(pixels.transpose(1, 2, 0)).convert("L").resize((9, 8), Image.Resampling.BOX)
    values = list(image.tobytes())
    bits = [values[row * 9 + column] < values[row * 9 + column + 1] for row in range(8) for column in range(8)]
    return sum(bit << place for place, bit in enumerate(bits))


def describe_duplicates(photos: list[Photo]) -> list[str]:
    """A phrase for each photo that is another one again, or nearly."""
    found, hashes = [], [difference_hash(photo.pixels) for photo in photos]
    for later, photo in enumerate(photos):
        for earlier in range(later):
            if photo.sha256 == photos[earlier].sha256:
                found.append(f"{photo.path.name!r} is {photos[earlier].path.name!r} again")
                break
            if (hashes[later] ^ hashes[earlier]).bit_count() <= NEAR_BITS:
                found.append(f"{photo.path.name!r} is nearly {photos[earlier].path.name!r}")
                break
    return found
