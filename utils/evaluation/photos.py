"""The subject's photos as evaluation sees them: found and decoded as for training, once for all stages."""

import functools
from pathlib import Path

from PIL import Image

from utils.dataset import decode, find_photos
from utils.files.ownership import run_of


def load_photos(folder: Path | None, finetuned: Path | None = None) -> dict[Path, Image.Image]:
    """The photos of a folder by path, sorted, as the model in the folder `finetuned` saw them; none without a folder.

    Raises UserError if one cannot be read: scores over some of the photos would pass for scores over all.
    """
    if folder is None or not folder.is_dir():
        return {}
    crop_bars = finetuned is not None and run_of(finetuned).get("arguments", {}).get("crop_bars") is True
    photos = find_photos(folder, may_be_empty=True)[0]
    return {path: _decoded(path, path.stat().st_mtime_ns, crop_bars) for path in photos}


@functools.lru_cache(maxsize=32)
def _decoded(path: Path, _changed: int, crop_bars: bool) -> Image.Image:
    return decode(path, crop_bars=crop_bars)
