"""Colours of an embedded profile as sRGB: what the photo shows is what is trained on."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from pillow_heif import register_heif_opener

from tests.helpers.photos import ADOBE_RGB, D50, DISPLAY_P3, cmyk_profile, grey_profile, rgb_profile, save, srgb_curve
from utils.photos.decoding import read_photo

register_heif_opener()
BEST = dict(
    jpg=dict(quality=100, subsampling=0),
    webp=dict(lossless=True),
    heic=dict(quality=-1, chroma=444),
    avif=dict(quality=100, subsampling="4:4:4"),
)
SEEN = [(200, 60, 40), (30, 160, 60), (128, 128, 128), (250, 240, 230), (0, 0, 0)]
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
PROFILES = {
    "Display P3": rgb_profile("Display P3", DISPLAY_P3),
    "Adobe RGB (1998)": rgb_profile("Adobe RGB (1998)", ADOBE_RGB, lambda x: x**2.19921875),
}


def as_coded(seen: tuple, primaries: tuple, gamma: float | None) -> tuple:
    """The numbers by which an RGB space says an sRGB colour, from both spaces' definitions."""
    light = np.array(SRGB).T @ srgb_curve(np.array(seen) / 255)
    linear = (np.linalg.inv(np.array(primaries).T) @ light).clip(0, 1)
    if gamma:
        return tuple((linear ** (1 / gamma) * 255).round().astype(int).tolist())
    coded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple((coded * 255).round().astype(int).tolist())


CODED = {
    "Display P3": lambda seen: as_coded(seen, DISPLAY_P3, None),
    "Adobe RGB (1998)": lambda seen: as_coded(seen, ADOBE_RGB, 2.19921875),
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg", "webp", "heic", "avif"])
def test_an_rgb_profile(tmp_path, suffix, name, seen):
    options = BEST.get(suffix, {})
    image = Image.new("RGB", (16, 16), CODED[name](seen))
    photo = read_photo(save(tmp_path, f"a.{suffix}", image, icc_profile=PROFILES[name], **options))
    off = 10 if suffix == "avif" else 6  # one step of these red values is up to nine of sRGB's, and AVIF rounds by one
    assert photo.image.getpixel((5, 5)) == pytest.approx(seen, abs=off)
    assert f"{name} converted to sRGB" in photo.done and photo.notes == []


def test_the_colours_of_transparent_and_of_palette_photos_are_converted(tmp_path):
    seen, name = (200, 60, 40), "Display P3"
    coded = CODED[name](seen)
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
    photo = read_photo(save(tmp_path, "a.png", image, icc_profile=grey_profile("linear grey", lambda x: x)))
    assert photo.image.getpixel((1, 1)) == pytest.approx((255 if mode == "1" else 188,) * 3, abs=1)
    assert "linear grey converted to sRGB" in photo.done


def test_a_grey_photo_with_an_rgb_profile(tmp_path):
    profile = rgb_profile("linear", SRGB, lambda x: x)
    photo = read_photo(save(tmp_path, "a.png", Image.new("L", (4, 4), 128), icc_profile=profile))
    assert photo.image.getpixel((1, 1)) == pytest.approx((188,) * 3, abs=1)


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
