"""The subject's photos as evaluation sees them: decoded as for training."""

from pathlib import Path

from PIL import Image

from utils.dataset import decode
from utils.errors import UserError


def load_photos(folder: Path | None) -> dict[Path, Image.Image]:
    """Every picture of a folder that can be read, by path, sorted; hidden and other files are passed over."""
    photos: dict[Path, Image.Image] = {}
    if folder is None or not folder.is_dir():
        return photos
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            photos[path] = decode(path)
        except UserError:
            continue
    return photos
