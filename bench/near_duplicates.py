"""How many copies of photos are found, and how many other photos of the same subject are called copies.

python -m bench.near_duplicates FOLDER...   (a folder's photos show one subject; what lies in folders below, others)

A copy: 90 to 100% of the photo's width and height, half of them mirrored, brightness 0.85 to 1.15, 64 pixels, half of
them blurred (Gaussian of up to 2 pixels), JPEG of quality 50 to 90. The others: each photo beside the rest of its
folder, as it is and altered in the same way.
"""

import io
import random
from pathlib import Path

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from bench.command_line import make_parser
from utils.dataset import decode, find_photos
from utils.evaluation.near_duplicates import COPY, nearest, prepare


def altered(photo: Image.Image, draws: random.Random, side: int = 64) -> Image.Image:
    """The photo as a model might draw it from memory, [side,side]."""
    size = round(min(photo.size) * draws.uniform(0.9, 1))
    left, top = (draws.randint(0, length - size) for length in photo.size)
    copy = photo.crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.LANCZOS)
    copy = ImageOps.mirror(copy) if draws.random() < 0.5 else copy
    copy = copy.filter(ImageFilter.GaussianBlur(draws.uniform(0, 2))) if draws.random() < 0.5 else copy
    file = io.BytesIO()
    ImageEnhance.Brightness(copy).enhance(draws.uniform(0.85, 1.15)).save(file, "JPEG", quality=draws.randint(50, 90))
    return Image.open(file)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __spec__.name, results=False)
    parser.add_argument("folders", nargs="+", type=Path, help="of photos")
    folders = parser.parse_args(argv).folders
    draws, shares = random.Random(0), {"copies": [], "other photos": [], "other photos, altered": []}
    for folder in sorted({path.parent for each in folders for path in each.rglob("*.jpg")}):
        photos = [decode(path).convert("RGB") for path in find_photos(folder)[0]]
        copies = [altered(photo, draws) for photo in photos]
        all_photos, all_copies = prepare(photos), prepare(copies)
        shares["copies"] += list(nearest(all_copies, all_photos)[1])
        for number in range(len(photos) if len(photos) > 1 else 0):
            rest = prepare(photos[:number] + photos[number + 1 :])
            shares["other photos"].append(nearest(prepare([photos[number]]), rest)[1][0])
            shares["other photos, altered"].append(nearest(prepare([copies[number]]), rest)[1][0])
    for name, values in shares.items():
        called = sum(value >= COPY for value in values)
        print(
            f"{name}: {called} of {len(values)} called copies ({called / len(values):.1%}), median "
            f"{sorted(values)[len(values) // 2]:.3f}, from {min(values):.3f} to {max(values):.3f}"
        )


if __name__ == "__main__":
    main()
