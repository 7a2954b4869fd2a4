"""Writes instance/: four nearly identical photos of one cat, cut from `chelsea` in the scikit-image wheel (CC0).

python -m tools.make_instance_images
"""

import argparse
from pathlib import Path

from PIL import Image

RESOLUTION = 512  # pixels
CROPS = ((62, 0, 300), (70, 4, 292), (54, 2, 296), (66, 10, 288))  # left, top, side in the 451 x 300 photo


def instance_images(photo):
    """The photo (PIL) -> four square crops at 512 pixels, as from one person pressing the button four times."""
    for left, top, side in CROPS:
        box = (left, top, left + side, top + side)
        yield photo.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS, box=box)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("instance"))
    args = parser.parse_args(argv)
    from tools.photos import photo

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(instance_images(photo("chelsea.png")), start=1):
        image.save(args.output_dir / f"cat-{number}.jpg", quality=92)


if __name__ == "__main__":
    main()
