"""Which pixels come out of which file."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from pillow_heif import from_pillow

from tests.helpers.photos import (
    ADOBE_RGB,
    CORNERS,
    D50,
    DISPLAY_P3,
    LOSSLESS,
    ORIENTATIONS,
    as_stored,
    cmyk_profile,
    corner_colours,
    grey_profile,
    rgb_profile,
    save,
    srgb_curve,
    turned,
    upright_picture,
)
from utils.photos.decoding import decode, read_photo, upright_size


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "tiff", "heif", "avif", "jxl"])
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    stored = Image.fromarray(as_stored(upright_picture(), orientation))
    options = LOSSLESS.get(suffix, {}) | dict(exif=turned(orientation).tobytes())
    image = decode(save(tmp_path, f"photo.{suffix}", stored, **options))
    assert image.size == (64, 32) and upright_size(tmp_path / f"photo.{suffix}") == (32, 64)
    np.testing.assert_allclose(corner_colours(image), CORNERS, atol=3)


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_is_ignored(tmp_path, orientation):
    image = decode(save(tmp_path, "photo.png", Image.fromarray(upright_picture()), exif=turned(orientation)))
    assert corner_colours(image) == CORNERS


def decoded_pixels(tmp_path, mode: str, values: list, suffix: str, **options) -> list[tuple[int, ...]]:
    """Of two pixels in a row."""
    image = Image.new(mode, (2, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    decoded = decode(save(tmp_path, f"photo.{suffix}", image, **options))
    assert decoded.mode == "RGB"
    return [decoded.getpixel((x, 0)) for x in range(2)]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_transparent_palette_colour_becomes_white(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode(save(tmp_path, "palette.png", image, transparency=transparency))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


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
    assert decoded_pixels(tmp_path, mode, values, suffix) == expected


@pytest.mark.parametrize(
    ("mode", "values", "transparent", "expected"),
    [
        ("RGBA", [(200, 0, 0, 255), (200, 0, 0, 0)], None, [(200, 0, 0), (255, 255, 255)]),
        ("RGBA", [(200, 0, 0, 255), (0, 0, 0, 51)], None, [(200, 0, 0), (204, 204, 204)]),
        ("LA", [(100, 255), (100, 0)], None, [(100, 100, 100), (255, 255, 255)]),
        ("L", [7, 0], 7, [(255, 255, 255), (0, 0, 0)]),
        ("RGB", [(7, 8, 9), (0, 0, 0)], (7, 8, 9), [(255, 255, 255), (0, 0, 0)]),
        ("I;16", [1000, 51400], 1000, [(255, 255, 255), (200, 200, 200)]),
    ],
)
def test_transparency_is_composited_on_white(tmp_path, mode, values, transparent, expected):
    """`transparent`: a colour that the file names so."""
    options = {} if transparent is None else dict(transparency=transparent)
    assert decoded_pixels(tmp_path, mode, values, "png", **options) == expected


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    options = dict(lossless=True) if suffix == "webp" else {}
    path = save(tmp_path, f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert decode(path).getpixel((4, 4)) == (250, 0, 0)


def test_what_was_done_is_said(tmp_path):
    upright = read_photo(save(tmp_path, "a.jpg", Image.new("RGB", (40, 30)), exif=turned(6)))
    assert upright.done == ["JPEG 30x40", "turned upright (EXIF 6)"]
    assert not upright.has_transparency and upright.notes == []
    opaque = read_photo(save(tmp_path, "b.png", Image.new("RGBA", (4, 4), (1, 2, 3, 255))))
    assert opaque.done == ["PNG 4x4"] and not opaque.has_transparency
    seen_through = read_photo(save(tmp_path, "c.png", Image.new("LA", (4, 4), (9, 51))))
    assert seen_through.done == ["PNG 4x4", "LA made RGB", "transparency on white"]
    assert seen_through.has_transparency
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


# Colours of an embedded profile as sRGB: what the photo shows is what is trained on.
SEEN = [(200, 60, 40), (30, 160, 60), (128, 128, 128), (250, 240, 230), (0, 0, 0)]
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
# The primaries and the gamma of an RGB space; None: sRGB's own curve.
SPACES = {"Display P3": (DISPLAY_P3, None), "Adobe RGB (1998)": (ADOBE_RGB, 2.19921875)}
PROFILES = {
    "Display P3": rgb_profile("Display P3", DISPLAY_P3),
    "Adobe RGB (1998)": rgb_profile("Adobe RGB (1998)", ADOBE_RGB, lambda x: x**2.19921875),
}


def as_coded(seen: tuple, space: str) -> tuple:
    """The numbers by which an RGB space says an sRGB colour, from both spaces' definitions."""
    primaries, gamma = SPACES[space]
    light = np.array(SRGB).T @ srgb_curve(np.array(seen) / 255)
    linear = (np.linalg.inv(np.array(primaries).T) @ light).clip(0, 1)
    if gamma:
        return tuple((linear ** (1 / gamma) * 255).round().astype(int).tolist())
    coded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple((coded * 255).round().astype(int).tolist())


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("suffix", ["png", "tiff", "jpeg", "webp", "heif", "avif"])
def test_an_rgb_profile(tmp_path, suffix, name, seen):
    options = LOSSLESS.get(suffix, {})
    image = Image.new("RGB", (16, 16), as_coded(seen, name))
    photo = read_photo(save(tmp_path, f"a.{suffix}", image, icc_profile=PROFILES[name], **options))
    off = 10 if suffix == "avif" else 6  # one step of these red values is up to nine of sRGB's, and AVIF rounds by one
    assert photo.image.getpixel((5, 5)) == pytest.approx(seen, abs=off)
    assert f"{name} converted to sRGB" in photo.done and photo.notes == []


def test_the_colours_of_transparent_and_of_palette_photos_are_converted(tmp_path):
    seen, name = (200, 60, 40), "Display P3"
    coded = as_coded(seen, name)
    half = Image.new("RGBA", (2, 1), (*coded, 255))
    half.putpixel((1, 0), (*coded, 0))
    photo = read_photo(save(tmp_path, "a.png", half, icc_profile=PROFILES[name]))
    assert photo.image.getpixel((0, 0)) == pytest.approx(seen, abs=4) and photo.image.getpixel((1, 0)) == (255,) * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([*coded, 0, 0, 0])
    photo = read_photo(save(tmp_path, "b.png", palette, icc_profile=PROFILES[name]))
    assert photo.image.getpixel((0, 0)) == pytest.approx(seen, abs=4)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_a_grey_profile(tmp_path, mode):
    """Of light itself: half the light is sRGB 188."""
    image = Image.new(mode, (4, 4), {"L": 128, "LA": (128, 255), "I;16": 32896, "1": 1}[mode])
    for profile in (grey_profile("linear", lambda x: x), rgb_profile("linear", SRGB, lambda x: x)):
        photo = read_photo(save(tmp_path, "a.png", image, icc_profile=profile))
        assert photo.image.getpixel((1, 1)) == pytest.approx((255 if mode == "1" else 188,) * 3, abs=1)
        assert "linear converted to sRGB" in photo.done


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_a_cmyk_profile(tmp_path, suffix):
    """Of a printer whose magenta ink is green: without the profile it would be magenta."""

    def lab(inks: tuple) -> tuple[float, float, float]:
        return (60.0, -30.0, 20.0) if inks[1] and not inks[3] else (100.0 * (1 - inks[3]), 0.0, 0.0)

    image = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    photo = read_photo(save(tmp_path, f"a.{suffix}", image, icc_profile=cmyk_profile("odd inks", lab)))
    cube = [(60 + 16) / 116 + shift for shift in (-30 / 500, 0, -20 / 200)]
    light = np.array(D50) * np.array(cube) ** 3  # CIE 15: all above the linear part
    expected = 1.055 * (np.linalg.inv(np.array(SRGB).T) @ light) ** (1 / 2.4) - 0.055
    assert photo.image.getpixel((5, 5)) == pytest.approx((expected * 255).tolist(), abs=4)
    assert "odd inks converted to sRGB" in photo.done


def test_a_lab_profile(tmp_path):
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    image = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 60, 40)), srgb, lab, outputMode="LAB")
    for name, options in (("a", dict(icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())), ("b", {})):
        photo = read_photo(save(tmp_path, f"{name}.tiff", image, **options))
        assert photo.image.getpixel((1, 1)) == pytest.approx((200, 60, 40), abs=3)


def test_srgb_by_any_name_changes_no_bit_and_is_not_said(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (built_in, rgb_profile("a camera's own", SRGB)):
        photo = read_photo(save(tmp_path, "a.png", noise, icc_profile=profile))
        assert photo.image.tobytes() == noise.tobytes()
        assert photo.done == ["PNG 32x32"] and photo.notes == []
    grey = noise.convert("L")
    photo = read_photo(save(tmp_path, "b.png", grey, icc_profile=grey_profile("sRGB grey", srgb_curve)))
    assert photo.image.tobytes() == grey.convert("RGB").tobytes() and photo.done == ["PNG 32x32"]


def cut(profile: bytes) -> bytes:
    return profile[: len(profile) // 3]


@pytest.mark.parametrize(
    ("mode", "profile", "note"),
    [
        ("RGB", b"not a profile", "its colour profile is broken: taken as sRGB"),
        ("RGB", cut(PROFILES["Display P3"]), "taken as sRGB"),
        ("RGB", PROFILES["Display P3"].replace(b"rXYZ", b"none", 1), "taken as sRGB"),
        ("RGB", grey_profile("grey", lambda x: x), "its colour profile grey is not for RGB: taken as sRGB"),
        ("CMYK", PROFILES["Display P3"], "its colour profile Display P3 is not for CMYK: taken as sRGB"),
    ],
)
def test_a_profile_that_cannot_be_used_is_left_out_with_a_note(tmp_path, mode, profile, note):
    image = Image.new(mode, (16, 16), (10, 200, 30, 0)[: len(mode)])
    photo = read_photo(save(tmp_path, "a.tiff", image, icc_profile=profile))
    assert photo.image.tobytes() == image.convert("RGB").tobytes()
    assert len(photo.notes) == 1 and photo.notes[0].endswith(note)


def test_random_damage_to_a_profile_never_costs_the_photo(tmp_path):
    random, whole = np.random.default_rng(0), PROFILES["Display P3"]
    for _ in range(100):
        content = np.frombuffer(whole, np.uint8).copy()
        places = random.integers(0, 400, 3)
        content[places] = random.integers(0, 256, 3)
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "PNG", icc_profile=content.tobytes())
        (tmp_path / "a.png").write_bytes(file.getvalue())
        assert read_photo(tmp_path / "a.png").image.size == (4, 4)
