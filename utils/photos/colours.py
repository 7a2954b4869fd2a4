"""Colours as sRGB, which the base model was trained on, whatever colour space a photo's profile names."""

import io
import itertools
from typing import NamedTuple

from PIL import Image, ImageChops, ImageCms

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # an ICC profile's colour space: Pillow's mode
SAME_AS_SRGB = 2  # a profile that changes no value by more is sRGB, whatever it is called
PROBE_LEVELS = range(0, 256, 15)


class InSrgb(NamedTuple):
    """An image in mode RGB, what was done for that, and what is odd about the file; both may be empty."""

    image: Image.Image
    done: str
    note: str


def to_srgb(image: Image.Image, profile: bytes | None) -> InSrgb:
    """The image, which has no transparency, in sRGB.

    `profile` is an ICC profile (ICC.1:2022); one that cannot be used is left out of account, with a note.
    """
    if not profile:
        return InSrgb(image.convert("RGB"), "", "")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        name = " ".join(ImageCms.getProfileDescription(source).split())[:40] or f"a profile for {space}"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return InSrgb(image.convert("RGB"), "", "its colour profile is broken: taken as sRGB")
    mode = MODES.get(space)
    if mode is None or not _fits(image.mode, mode):
        return InSrgb(image.convert("RGB"), "", f"its colour profile {name} is not for {image.mode}: taken as sRGB")
    srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.PERCEPTUAL
    try:
        transform = ImageCms.buildTransform(
            source, srgb, mode, "RGB", intent, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
        if mode in ("RGB", "L") and _changes_nothing(transform, mode):
            return InSrgb(image.convert("RGB"), "", "")
        converted = ImageCms.applyTransform(image.convert(mode), transform)
    except (ImageCms.PyCMSError, ValueError):
        return InSrgb(image.convert("RGB"), "", f"its colour profile {name} cannot be used: taken as sRGB")
    assert converted is not None
    return InSrgb(converted, f"{name} converted to sRGB", "")


def _fits(image_mode: str, profile_mode: str) -> bool:
    """Whether the profile can be for these pixels: grey ones may have one for RGB, others need their own kind."""
    if profile_mode == "RGB":
        return image_mode not in ("CMYK", "LAB")
    return image_mode == profile_mode or (profile_mode == "L" and image_mode == "1")


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether sRGB comes out as it went in, tried on a grid of colours or on all greys."""
    grid = bytes(itertools.chain.from_iterable(itertools.product(PROBE_LEVELS, repeat=3)))
    probe = Image.frombytes("RGB", (len(grid) // 3, 1), grid) if mode == "RGB" else Image.linear_gradient("L")
    converted = ImageCms.applyTransform(probe, transform)
    assert converted is not None
    return max(ImageChops.difference(converted, probe.convert("RGB")).tobytes()) <= SAME_AS_SRGB
