"""The photo folder: which files are photos, and each photo as pixel_values."""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.photos.captions import SUFFIXES as CAPTION_SUFFIXES
from utils.photos.captions import read_captions
from utils.photos.decoding import decode, read_photo, treat_bars, upright_size
from utils.photos.formats import NOT_AN_IMAGE, why_not_a_photo

if TYPE_CHECKING:  # imported where it is used: the preflight needs no torch, whose import takes longer than all else
    import torch


class Photo(NamedTuple):
    """A decoded photo: `pixels` uint8 [3,H,W], whose shorter side is the training resolution.

    `original_size` is that of the photo without bars that are cut off, `done` and `notes` are the decoder's.
    """

    path: Path
    sha256: str
    original_size: tuple[int, int]
    pixels: np.ndarray
    prompt: str = ""
    done: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_photos(
    directory: Path, flag: str = "--instance_data_dir", *, may_be_empty: bool = False
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Sorted photo files of a folder, and what was skipped with the reason, by headers. UserError if there is none."""
    if not directory.is_dir():
        raise UserError(f"{flag}: there is no folder {directory}; put 3 to 6 photos of the subject there")
    reasons = {path: _reason_to_skip(path) for path in sorted(directory.iterdir(), key=lambda entry: entry.name)}
    photos = [path for path, reason in reasons.items() if reason is None]
    skipped = [(path, reason) for path, reason in reasons.items() if reason is not None]
    if not photos and not may_be_empty:
        found = f"; it holds only {', '.join(p.name for p, _ in skipped[:5])}" if skipped else ""
        raise UserError(f"{flag}: no photo in {directory}{found}; JPEG, PNG, WebP, HEIC, AVIF and JPEG XL are read")
    return photos, skipped


def _reason_to_skip(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return "not a regular file"
    if path.suffix.lower() in CAPTION_SUFFIXES:
        return NOT_AN_IMAGE
    return why_not_a_photo(path)


def resize_shorter_side(image: Image.Image, resolution: int) -> Image.Image:
    """By Lanczos' filter, aspect kept; the longer side is rounded down as in the recipe's transform.

    The recipe's bilinear filter blurs what training is to learn (docs/decisions.md).
    """
    size = _resized(image.size, resolution)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    shorter = min(size)
    return resolution * size[0] // shorter, resolution * size[1] // shorter


class Crops:
    """Square crops of images whose shorter side is `resolution`, R, in pixels; `center_crop`: of their middles."""

    resolution: int
    center_crop: bool
    sizes: list[tuple[int, int]]  # (height, width) of each

    def __len__(self) -> int:
        return len(self.sizes)

    def crop_origin(self, photo: int, position: tuple[float, float]) -> tuple[int, int]:
        """(top, left) in pixels of the crop of image number `photo`; `position` is two numbers in [0,1)."""
        spare = [side - self.resolution for side in self.sizes[photo]]
        if self.center_crop:
            return int(round(spare[0] / 2)), int(round(spare[1] / 2))
        return int(position[0] * (spare[0] + 1)), int(position[1] * (spare[1] + 1))

    @property
    def has_fixed_crops(self) -> bool:
        """Whether every image has one crop only: it is square, or the crop is centred."""
        return self.center_crop or all(height == width for height, width in self.sizes)

    def pixels(self, photo: int) -> np.ndarray:
        """uint8 [3,H,W] of image number `photo`."""
        raise NotImplementedError

    def pixel_values(self, photo: int, top: int, left: int) -> "torch.Tensor":
        """float32 [3,R,R] in [-1,1] of a crop."""
        import torch

        crop = self.pixels(photo)[:, top : top + self.resolution, left : left + self.resolution]
        return torch.from_numpy(crop).float() / 127.5 - 1.0


class InstanceDataset(Crops):
    """The subject's photos, decoded once.

    Args:
        directory: folder of photos; anything else in it is skipped and listed in `skipped`.
        prompt: what the photos show; a caption beside a photo replaces it for that photo.
        crop_bars: bars of one colour along a photo's edges are cut off.

    Attributes:
        num_captions: photos whose prompt is a caption.

    Raises:
        UserError: no folder, no photo, or an unreadable one; captions that are of no photo, or contradict each other.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        resolution: int,
        center_crop: bool = False,
        prompt: str = "",
        crop_bars: bool = False,
    ):
        paths, skipped = find_photos(Path(directory))
        captions, caption_files = read_captions(paths, [path for path, _ in skipped])
        self.skipped = [(path, reason) for path, reason in skipped if path not in caption_files]
        self.num_captions = len(captions)
        self.resolution = resolution
        self.center_crop = center_crop
        self.instance_prompt = prompt
        self.crop_bars = crop_bars
        self.photos = [self._read(path, captions.get(path, prompt)) for path in paths]
        self.sizes = [photo.pixels.shape[1:] for photo in self.photos]

    def _read(self, path: Path, prompt: str) -> Photo:
        decoded = treat_bars(read_photo(path), crop_bars=self.crop_bars)
        pixels = np.array(resize_shorter_side(decoded.image, self.resolution))
        return Photo(
            path=path,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            original_size=decoded.image.size,
            pixels=np.ascontiguousarray(pixels.transpose(2, 0, 1)),
            prompt=prompt,
            done=tuple(decoded.done),
            notes=tuple(decoded.notes),
        )

    def extend(self, other: "InstanceDataset") -> None:
        """Adds another subject's photos, of the same resolution and crop, after this one's."""
        self.photos += other.photos
        self.sizes += other.sizes
        self.skipped += other.skipped
        self.num_captions += other.num_captions

    def prompt(self, photo: int) -> str:
        """What photo number `photo` shows: its caption, or its subject's prompt."""
        return self.photos[photo].prompt

    def pixels(self, photo: int) -> np.ndarray:
        """uint8 [3,H,W] of photo number `photo`."""
        return self.photos[photo].pixels


class ClassDataset(Crops):
    """The class images that are used, (path, class prompt) each, decoded when they are asked for; an InstanceDataset
    to whoever draws crops.
    """

    def __init__(self, images: list[tuple[Path, str]], resolution: int, center_crop: bool = False):
        self.resolution = resolution
        self.center_crop = center_crop
        self.images = images
        self.sizes = [_resized(upright_size(path), resolution) for path, _ in images]

    def record(self) -> list[dict]:
        """For run.json: each class's folder, prompt and number of images."""
        counts = Counter((path.parent, prompt) for path, prompt in self.images)
        return [dict(folder=str(folder), prompt=prompt, num_used=n) for (folder, prompt), n in counts.items()]

    def prompt(self, photo: int) -> str:
        """The class prompt of image number `photo`."""
        return self.images[photo][1]

    def pixels(self, photo: int) -> np.ndarray:
        """uint8 [3,H,W] of image number `photo`, decoded anew."""
        return np.array(resize_shorter_side(decode(self.images[photo][0]), self.resolution)).transpose(2, 0, 1)
