"""The photo folder: which files are photos, and each photo as pixel_values."""

import hashlib
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError

if TYPE_CHECKING:  # imported where it is used: the preflight needs no torch, whose import takes longer than all else
    import torch

# Pillow's remarks about large or slightly damaged photos are the preflight table's to make.
warnings.filterwarnings("ignore", module="PIL")

# Photos that Pillow cannot read by itself: leaving them out silently would surprise their owner.
UNSUPPORTED_PHOTO_SUFFIXES = {".heic", ".heif", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"}

CAPTION_SUFFIX = ".txt"


class Photo(NamedTuple):
    """A decoded photo: `pixels` uint8 [3,H,W], whose shorter side is the training resolution."""

    path: Path
    sha256: str
    original_size: tuple[int, int]
    pixels: np.ndarray
    prompt: str = ""


def find_photos(
    directory: Path, flag: str = "--instance_data_dir", *, may_be_empty: bool = False
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Sorted photo files of a folder, and what was skipped with the reason; a file is opened only to read its header.

    Raises UserError if there is no such folder, no photo in it, or a file that should be a photo but is unreadable.
    """
    if not directory.is_dir():
        raise UserError(f"{flag}: there is no folder {directory}; put 3 to 6 photos of the subject there")
    photos, skipped = [], []
    for path in sorted(directory.iterdir(), key=lambda entry: entry.name):
        reason = _reason_to_skip(path)
        if reason:
            skipped.append((path, reason))
        else:
            photos.append(path)
    if not photos and not may_be_empty:
        found = f"; it holds only {', '.join(p.name for p, _ in skipped[:5])}" if skipped else ""
        raise UserError(f"{flag}: no photo in {directory}{found}; JPEG, PNG and WebP files are read")
    captions = {path.with_suffix(CAPTION_SUFFIX) for path in photos}
    return photos, [(path, reason) for path, reason in skipped if path not in captions]


def read_caption(photo: Path) -> str | None:
    """The text of NAME.txt beside a photo NAME.jpg, on one line; None if there is none.

    Raises UserError if it is empty or cannot be read as UTF-8 text.
    """
    path = photo.with_suffix(CAPTION_SUFFIX)
    if not path.is_file():
        return None
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, the caption of {photo.name}, cannot be read as UTF-8 text: {error}") from error
    if not caption:
        raise UserError(f"{path}, the caption of {photo.name}, is empty; write what the photo shows, or remove it")
    return caption


def _reason_to_skip(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "not a regular file"
    suffix = path.suffix.lower()
    if suffix in UNSUPPORTED_PHOTO_SUFFIXES:
        raise UserError(f"{path} is a {suffix[1:].upper()} photo, which Pillow cannot read; convert it to JPEG or PNG")
    try:
        with Image.open(path):
            return None
    except UnidentifiedImageError:
        if Image.registered_extensions().get(suffix) in Image.OPEN:
            raise UserError(f"{path} cannot be read as an image; replace it or remove it from the folder") from None
        return "not an image"
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read: {error}; replace it or remove it from the folder") from error


def decode(path: Path) -> Image.Image:
    """The photo upright (EXIF orientation applied) in RGB, transparency composited on white; first frame if animated.

    Raises UserError naming the file if it is truncated or corrupt.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be decoded: {error}; replace it or remove it from the folder") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit and float greyscale: Pillow's own conversion would clip everything above 255 to white.
        values = np.asarray(image).astype(np.float64)
        # An integer mode is 16 bits, however dark the photo; floats are customary in [0,1] and in [0,255].
        top = 65535.0 if image.mode != "F" else 255.0 if values.max(initial=0) > 1 else 1.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def resize_shorter_side(image: Image.Image, resolution: int) -> Image.Image:
    """Bilinear, antialiased, aspect kept; the longer side is rounded down as in the recipe's transform."""
    width, height = image.size
    shorter = min(width, height)
    size = (resolution * width // shorter, resolution * height // shorter)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def crop_origin(
    size: tuple[int, int], resolution: int, center_crop: bool, position: tuple[float, float]
) -> tuple[int, int]:
    """(top, left) of a square crop in an image of `size` (height, width) at `position`, two numbers in [0,1)."""
    spare = [side - resolution for side in size]
    if center_crop:
        return int(round(spare[0] / 2)), int(round(spare[1] / 2))
    return int(position[0] * (spare[0] + 1)), int(position[1] * (spare[1] + 1))


class InstanceDataset:
    """The subject's photos, decoded once.

    Args:
        directory: folder of photos; anything else in it is skipped and listed in `skipped`.
        resolution: side R of the square crops in pixels.
        center_crop: crop the middle instead of a random place.
        prompt: what the photos show; a caption beside a photo replaces it for that photo.

    Raises:
        UserError: no folder, no photo, or an unreadable one.
    """

    def __init__(self, directory: str | os.PathLike, resolution: int, center_crop: bool = False, prompt: str = ""):
        paths, self.skipped = find_photos(Path(directory))
        self.resolution = resolution
        self.center_crop = center_crop
        self.instance_prompt = prompt
        self.photos = [self._read(path) for path in paths]

    def __len__(self) -> int:
        return len(self.photos)

    def _read(self, path: Path) -> Photo:
        image = decode(path)
        pixels = np.array(resize_shorter_side(image, self.resolution))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        prompt = read_caption(path) or self.instance_prompt
        return Photo(path, digest, image.size, np.ascontiguousarray(pixels.transpose(2, 0, 1)), prompt)

    def extend(self, other: "InstanceDataset") -> None:
        """Adds another subject's photos, of the same resolution and crop, after this one's."""
        self.photos += other.photos
        self.skipped += other.skipped

    def prompt(self, photo: int) -> str:
        """What photo number `photo` shows: its caption, or its subject's prompt."""
        return self.photos[photo].prompt

    def crop_origin(self, photo: int, position: tuple[float, float]) -> tuple[int, int]:
        """(top, left) in pixels of the crop of photo number `photo`; `position` is two numbers in [0,1)."""
        return crop_origin(self.photos[photo].pixels.shape[1:], self.resolution, self.center_crop, position)

    @property
    def has_fixed_crops(self) -> bool:
        """Whether every photo has one crop only: all are square, or the crop is centred."""
        return self.center_crop or all(len(set(photo.pixels.shape[1:])) == 1 for photo in self.photos)

    def pixel_values(self, photo: int, top: int, left: int) -> "torch.Tensor":
        """float32 [3,R,R] in [-1,1]."""
        import torch

        side = self.resolution
        crop = self.photos[photo].pixels[:, top : top + side, left : left + side]
        return torch.from_numpy(crop).float() / 127.5 - 1.0


class ClassDataset:
    """The class images that are used, decoded when they are asked for; an InstanceDataset to whoever draws crops.

    Args:
        images: (path, class prompt) each.
        resolution: side R of the square crops in pixels.
        center_crop: crop the middle instead of a random place.
    """

    def __init__(self, images: list[tuple[Path, str]], resolution: int, center_crop: bool = False):
        self.resolution = resolution
        self.center_crop = center_crop
        self.images = images
        self.sizes = [self._resized_size(path) for path, _ in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def _resized_size(self, path: Path) -> tuple[int, int]:
        """(height, width) after upright turning and resizing, from the file's header."""
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # orientations that exchange width and height
                width, height = height, width
        shorter = min(width, height)
        return self.resolution * height // shorter, self.resolution * width // shorter

    def record(self) -> list[dict]:
        """For run.json: each class's folder, prompt and number of images."""
        counts = Counter((path.parent, prompt) for path, prompt in self.images)
        return [dict(folder=str(folder), prompt=prompt, num_used=n) for (folder, prompt), n in counts.items()]

    def prompt(self, photo: int) -> str:
        """The class prompt of image number `photo`."""
        return self.images[photo][1]

    def crop_origin(self, photo: int, position: tuple[float, float]) -> tuple[int, int]:
        """(top, left) in pixels of the crop of image number `photo`; `position` is two numbers in [0,1)."""
        return crop_origin(self.sizes[photo], self.resolution, self.center_crop, position)

    @property
    def has_fixed_crops(self) -> bool:
        """Whether every image has one crop only."""
        return self.center_crop or all(height == width for height, width in self.sizes)

    def pixel_values(self, photo: int, top: int, left: int) -> "torch.Tensor":
        """float32 [3,R,R] in [-1,1]."""
        import torch

        image = resize_shorter_side(decode(self.images[photo][0]), self.resolution)
        pixels = np.array(image)[top : top + self.resolution, left : left + self.resolution]
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0
