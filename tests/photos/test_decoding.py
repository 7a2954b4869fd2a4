"""Which pixels come out of which file."""

import numpy as np
import pillow_jxl  # noqa: F401  it registers itself
import pytest
from PIL import ExifTags, Image
from pillow_heif import from_pillow, register_heif_opener

from tests.helpers.photos import CORNERS, ORIENTATIONS, as_stored, corner_colours, save, upright_picture
from utils.photos.decoding import decode, read_photo, upright_size

register_heif_opener()
LOSSLESS = dict(
    jpg=dict(quality=100, subsampling=0),
    webp=dict(lossless=True),
    heic=dict(quality=-1, chroma=444),
    avif=dict(quality=100, subsampling="4:4:4"),
    jxl=dict(lossless=True, use_container=True),
)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "heic", "avif", "jxl"])
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(as_stored(upright_picture(), orientation))
    options = LOSSLESS.get(suffix, {})
    image = decode(save(tmp_path, f"photo.{suffix}", stored, exif=exif.tobytes(), **options))
    assert image.size == (64, 32) and upright_size(tmp_path / f"photo.{suffix}") == (32, 64)
    np.testing.assert_allclose(corner_colours(image), CORNERS, atol=3)


@pytest.mark.parametrize(("orientation", "expected"), [(0, 1), (9, 1), (6, 6)])
def test_an_orientation_that_does_not_exist_is_ignored(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = as_stored(upright_picture(), expected)
    image = decode(save(tmp_path, "photo.png", Image.fromarray(stored), exif=exif))
    assert corner_colours(image) == CORNERS


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 51)]
    image = decode(save(tmp_path, "rgba.png", Image.fromarray(rgba)))
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(3)] == [(200, 0, 0), (255, 255, 255), (204, 204, 204)]
    grey = np.array([[(100, 255), (100, 0)]], np.uint8)
    image = decode(save(tmp_path, "la.png", Image.fromarray(grey, "LA")))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(100, 100, 100), (255, 255, 255)]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_transparent_palette_colour_becomes_white(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode(save(tmp_path, "palette.png", image, transparency=transparency))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9))])
def test_a_colour_named_transparent_becomes_white(tmp_path, mode, colour):
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), 0 if mode == "L" else (0, 0, 0))
    decoded = decode(save(tmp_path, "key.png", image, transparency=colour))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


@pytest.mark.parametrize(
    ("mode", "suffix", "values", "expected"),
    [
        ("1", "png", [0, 255], [(0, 0, 0), (255, 255, 255)]),
        ("L", "png", [0, 77], [(0, 0, 0), (77, 77, 77)]),
        ("RGB", "png", [(1, 2, 3), (255, 0, 9)], [(1, 2, 3), (255, 0, 9)]),
        ("CMYK", "tiff", [(0, 0, 0, 0), (0, 255, 255, 0)], [(255, 255, 255), (255, 0, 0)]),
        ("I;16", "png", [0, 65535], [(0, 0, 0), (255, 255, 255)]),
        ("I;16", "tiff", [32768, 65535], [(128, 128, 128), (255, 255, 255)]),
        ("I", "tiff", [0, 65535], [(0, 0, 0), (255, 255, 255)]),
        ("I", "tiff", [-5, 51400], [(0, 0, 0), (200, 200, 200)]),
        ("I;16", "png", [0, 255], [(0, 0, 0), (1, 1, 1)]),
        ("F", "tiff", [0.0, 1.0], [(0, 0, 0), (255, 255, 255)]),
        ("F", "tiff", [51.0, 255.0], [(51, 51, 51), (255, 255, 255)]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix, values, expected):
    image = Image.new(mode, (2, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    decoded = decode(save(tmp_path, f"photo.{suffix}", image))
    assert decoded.mode == "RGB"
    assert [decoded.getpixel((x, 0)) for x in range(2)] == expected


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    options = dict(lossless=True) if suffix == "webp" else {}
    path = save(tmp_path, f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert decode(path).getpixel((4, 4)) == (250, 0, 0)


def test_transparency_of_16_bits_becomes_white(tmp_path):
    grey = Image.fromarray(np.array([[1000, 51400]], np.uint16))
    decoded = decode(save(tmp_path, "key.png", grey, transparency=1000))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 200, 200)]


def test_what_was_done_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_photo(save(tmp_path, "a.jpg", Image.new("RGB", (40, 30)), exif=exif))
    assert turned.done == ["JPEG 30x40", "turned upright (EXIF 6)"] and turned.alpha is None and turned.notes == []
    opaque = read_photo(save(tmp_path, "b.png", Image.new("RGBA", (4, 4), (1, 2, 3, 255))))
    assert opaque.done == ["PNG 4x4"] and opaque.alpha is None
    seen_through = read_photo(save(tmp_path, "c.png", Image.new("LA", (4, 4), (9, 51))))
    assert seen_through.done == ["PNG 4x4", "LA made RGB", "transparency on white"]
    assert seen_through.alpha.getpixel((0, 0)) == 51
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animated = read_photo(save(tmp_path, "d.webp", frames[0], save_all=True, append_images=frames[1:]))
    assert animated.done == ["WEBP 8x8", "first of 2 frames"]


def test_a_camera_in_adobe_rgb_without_a_profile_is_said(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {ExifTags.Interop.InteropIndex: "R03"}
    photo = read_photo(save(tmp_path, "a.jpg", Image.new("RGB", (8, 8)), exif=exif))
    assert photo.notes == ["Adobe RGB without an ICC profile, taken as sRGB: its colours will look dull"]


@pytest.mark.parametrize(
    ("transfer", "primaries", "said"), [(16, 9, "HDR (PQ)"), (18, 9, "HDR (HLG)"), (13, 12, "Display P3")]
)
def test_an_heif_whose_colours_are_not_understood(tmp_path, transfer, primaries, said):
    image = from_pillow(Image.new("RGB", (64, 64), (90, 80, 70)))
    image.save(tmp_path / "a.hif", color_primaries=primaries, transfer_characteristics=transfer, matrix_coefficients=9)
    (note,) = read_photo(tmp_path / "a.hif").notes
    assert said in note and "taken as sRGB" in note
