"""PNG files with texts in them, there whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.files.atomic import replace_path

COMPRESSION = 3  # zlib's level: 2.6 times as fast as the usual 6, and the files are 6% larger


def save_png(path: Path, image: Image.Image, texts: Mapping[str, object] = MappingProxyType({})) -> None:
    """Writes a PNG whose text metadata holds `texts`, less those that are None."""
    metadata = PngInfo()
    for name, value in texts.items():
        if value is not None:
            metadata.add_itxt(name, str(value))
    options: dict[str, Any] = dict(format="PNG", pnginfo=metadata, compress_level=COMPRESSION)
    replace_path(path, lambda part: image.save(part, **options), is_shared=True)
