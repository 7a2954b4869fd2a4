"""The one decoder: whatever a photo's file holds becomes an upright 8-bit picture in sRGB; bars along its edges."""

import contextlib
import io
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps

from utils.photos.formats import open_photo

EXIF_ORIENTATION = 0x0112
WITH_ALPHA = {"RGBA", "LA", "PA", "RGBa", "La"}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # an ICC profile's colour space: Pillow's mode
SAME_AS_SRGB = 2  # a profile that changes no value by more is sRGB, whatever it is called
PROBE_LEVELS = range(0, 256, 15)
# Of a bar of one colour along a photo's edge, as around a photo in a screenshot (docs/photos.md).
TOLERANCE = 8  # of 255: what JPEG does to one colour
IN_THE_BAR, IN_THE_PHOTO = 0.7, 0.4  # at least, and at most, so much of a row has the bar's colour
PURE = 0.97  # so much at least of the rows next to the photo, where no phone shows anything
TRANSITION = 5  # rows from a pure one to the photo: JPEG blurs a bar's end by these, other edges are less straight
NARROWEST = 0.01  # of the side
NUM_SAMPLES = 256  # pixels of a row that are looked at


class DecodedPhoto(NamedTuple):
    """`image` is RGB with white behind what is transparent, if `has_transparency`.

    `done` says what the file is and what was done to it, `notes` what its owner should know: phrases for the table.
    """

    image: Image.Image
    has_transparency: bool
    done: list[str]
    notes: list[str]


def decode(path: Path, *, crop_bars: bool = False) -> Image.Image:
    """The photo in RGB as read_photo gives it, which see for what is done and raised."""
    photo = read_photo(path)
    return (treat_bars(photo, crop_bars=True) if crop_bars else photo).image


def read_photo(path: Path) -> DecodedPhoto:
    """The photo upright (EXIF), in 8-bit sRGB, on white; the first picture of several. UserError as open_photo."""
    with open_photo(path) as image:
        num_frames, orientation = getattr(image, "n_frames", 1), image.getexif().get(EXIF_ORIENTATION, 1)
        image.load()
        profile, mode = image.info.get("icc_profile"), image.mode
        notes = _colours_not_understood(image) if not profile else []
        colour, alpha = _split_alpha(ImageOps.exif_transpose(image))
        rgb, converted, odd = to_srgb(_as_8_bits(colour), profile)
        done = [f"{image.format} {rgb.width}x{rgb.height}"]
        done += [f"turned upright (EXIF {orientation})"] if orientation in range(2, 9) else []
        done += [converted] if converted else [f"{mode} made RGB"] if mode not in ("RGB", "RGBA", "L") else []
        done += ["transparency on white"] if alpha else []
        done += [f"first of {num_frames} frames"] if num_frames > 1 else []
        notes += [odd] if odd else []
        notes += ["transparent everywhere: only white is left"] if alpha and not alpha.getbbox() else []
        return DecodedPhoto(_on_white(rgb, alpha), alpha is not None, done, notes)


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of what decode() gives, from the file's header if that says it. Raises UserError as that."""
    with open_photo(path) as image:
        if image.format == "TIFF":
            image.load()  # Pillow turns a TIFF by itself: its size does so before, or with its pixels, by the version
        width, height = image.size
        turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5  # orientations that exchange width and height
        return (width, height) if turned else (height, width)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency, and the opacity, mode L; None if all is opaque."""
    key = image.info.get("transparency")
    if image.mode.startswith("I;16") and key is not None:
        alpha = Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
        return image, _unless_opaque(alpha)
    if image.mode not in WITH_ALPHA and key is None or image.mode in ("I", "F"):
        return image, None
    is_grey = image.mode in ("L", "LA", "La", "1")
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    alpha = rgba.getchannel("A")
    colour = rgba.getchannel("R") if is_grey else rgba.convert("RGB")
    return colour, _unless_opaque(alpha)


def _unless_opaque(alpha: Image.Image) -> Image.Image | None:
    return alpha if np.asarray(alpha).min(initial=255) < 255 else None


def _as_8_bits(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale as mode L: Pillow's own conversion would clip everything above 255 to white."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    # An integer mode is 16 bits, however dark the photo; floats are customary in [0,1] and in [0,255].
    top = 65535.0 if image.mode != "F" else 255.0 if values.max(initial=0) > 1 else 1.0
    return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))


def _on_white(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None:
        return rgb
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, (255, 255, 255, 255)), rgba).convert("RGB")


def _colours_not_understood(image: Image.Image) -> list[str]:
    """What a photo without an ICC profile says of its colours: an HEIF in numbers of ITU-T H.273, others in EXIF."""
    with contextlib.suppress(KeyError):  # Pillow before 12 raises it for a photo without that folder of tags
        if image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03":
            return ["Adobe RGB without an ICC profile, taken as sRGB: its colours will look dull"]
    nclx = image.info.get("nclx_profile") or {}
    transfer, primaries = nclx.get("transfer_characteristics"), nclx.get("color_primaries")
    if transfer in HDR_TRANSFERS:
        return [f"HDR ({HDR_TRANSFERS[transfer]}) taken as sRGB, it will look flat: export it as JPEG"]
    wide = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}.get(primaries or 0)
    return [f"{wide} without an ICC profile, taken as sRGB: its colours will look dull"] if wide else []


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str, str]:
    """An image without transparency in mode RGB and sRGB, which the base was trained on; what was done, what is odd.

    `profile` is an ICC profile (ICC.1:2022); one that cannot be used is left out of account, with a note.
    """
    if not profile:
        return image.convert("RGB"), "", ""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        name = " ".join(ImageCms.getProfileDescription(source).split())[:40] or f"a profile for {space}"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB"), "", "its colour profile is broken: taken as sRGB"
    mode = MODES.get(space)
    if mode is None or not _fits(image.mode, mode):
        return image.convert("RGB"), "", f"its colour profile {name} is not for {image.mode}: taken as sRGB"
    srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.PERCEPTUAL
    try:
        transform = ImageCms.buildTransform(
            source, srgb, mode, "RGB", intent, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
        if mode in ("RGB", "L") and _changes_nothing(transform, mode):
            return image.convert("RGB"), "", ""
        converted = ImageCms.applyTransform(image.convert(mode), transform)
    except (ImageCms.PyCMSError, ValueError):
        return image.convert("RGB"), "", f"its colour profile {name} cannot be used: taken as sRGB"
    assert converted is not None
    return converted, f"{name} converted to sRGB", ""


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


def treat_bars(photo: DecodedPhoto, *, crop_bars: bool) -> DecodedPhoto:
    """The photo without the bars along its edges, or with a note on them; a transparent one as it is."""
    bars = {} if photo.has_transparency else find_bars(photo.image)
    if not bars:
        return photo
    said = f"{', '.join(f'{side} {thickness}' for side, thickness in bars.items())} pixels"
    if not crop_bars:
        note = f"bars of one colour are learned too, --crop_bars cuts them off ({said})"
        return photo._replace(notes=[*photo.notes, note])
    width, height = photo.image.size
    left, top, right, bottom = (bars.get(side, 0) for side in ("left", "top", "right", "bottom"))
    image = photo.image.crop((left, top, width - right, height - bottom))
    return photo._replace(image=image, done=[*photo.done, f"bars cut off ({said})"])


def find_bars(image: Image.Image) -> dict[str, int]:
    """Pixels of bar at "top", "bottom", "left" and "right" of an RGB image, those that have one.

    A row belongs to a bar if most of it has one colour, that of the edge: icons of a phone may lie in it. Next to
    the photo it must have that colour alone and change within a few rows, all along, so that neither the plain
    background of a subject nor a dark table is one.
    """
    pixels = np.asarray(image)
    found = dict(top=_thickness(pixels), bottom=_thickness(pixels[::-1]))
    between = pixels[found["top"] : len(pixels) - found["bottom"]].swapaxes(0, 1)
    found |= dict(left=_thickness(between), right=_thickness(between[::-1]))
    return {side: thickness for side, thickness in found.items() if thickness}


def _thickness(rows: np.ndarray) -> int:
    """Rows of bar at the beginning of uint8 [H,W,3]; 0 if there is none."""
    rows = rows[:, :: max(1, rows.shape[1] // NUM_SAMPLES)].astype(np.int16)
    share = (np.abs(rows - np.median(rows[0], axis=0)) <= TOLERANCE).all(axis=2).mean(axis=1)
    end = int(np.argmax(share < IN_THE_BAR))  # 0 if there is no such row
    if end < max(3, NARROWEST * len(rows)):
        return 0
    last_rows = np.arange(max(0, end - TRANSITION), end)
    beyond = np.minimum(last_rows + TRANSITION, len(rows) - 1)
    return end if ((share[last_rows] >= PURE) & (share[beyond] <= IN_THE_PHOTO)).any() else 0
