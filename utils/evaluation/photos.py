"""The subject's photos as evaluation sees them: found and decoded as for training, once for all stages."""

import functools
from pathlib import Path

from PIL import Image

from utils.dataset import decode, find_photos


def load_photos(folder: Path | None) -> dict[Path, Image.Image]:
    """The photos of a folder by path, sorted; none without a folder.

    Raises UserError if one cannot be read: scores over some of the photos would pass for scores over all.
    """
    if folder is None or not folder.is_dir():
        return {}
    return {path: _decoded(path, path.stat().st_mtime_ns) for path in find_photos(folder, may_be_empty=True)[0]}


@functools.lru_cache(maxsize=32)
def _decoded(path: Path, _changed: int) -> Image.Image:
    return decode(path)
