"""What a file is by its content: photos that need a package, camera raw whatever it is called."""

import builtins
import importlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tests.helpers.photos import LOSSLESS, save, upright_picture
from tests.helpers.script import run_python
from utils.dataset import InstanceDataset, find_photos
from utils.errors import UserError
from utils.photos.decoding import decode
from utils.photos.formats import RAW_MAGIC, RAW_SUFFIXES

KINDS = ["jpeg", "png", "webp", "bmp", "tiff", "gif", "heif", "avif", "jxl"]


@pytest.mark.parametrize("name", ["a.heic", "A.HIF", "a.JPEG", "a.avif", "a.jpg", "a"])
@pytest.mark.parametrize("kind", KINDS)
def test_photos_are_read_by_their_content_whatever_they_are_called(tmp_path, kind, name):
    save(tmp_path, name, Image.fromarray(upright_picture()), format=kind, **LOSSLESS.get(kind, {}))
    photo = InstanceDataset(tmp_path, 32).photos[0]
    assert np.abs(photo.pixels.transpose(1, 2, 0).astype(int) - upright_picture())[::31, ::63].max() <= 3
    assert photo.done[0] == f"{kind.upper()} 64x32"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow says about the damage
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0, 0.02, 0.3, 0.5, 0.7, 0.97])
def test_a_cut_one_is_refused_by_name(tmp_path, kind, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    path = save(tmp_path, f"cut.{kind}", noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match=f"cut.{kind} cannot be") as error:
        InstanceDataset(tmp_path, 16)
    assert "\n" not in str(error.value) and "libjxl" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "module", "package"), [("heif", "pillow_heif", "pillow-heif"), ("jxl", "pillow_jxl", "pillow-jxl-plugin")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, kind, module, package):
    path = save(tmp_path, f"a.{kind}", Image.fromarray(upright_picture()))

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importing(name, *args, **kwargs)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr(importlib, "import_module", missing)
    for read in (decode, lambda path: find_photos(path.parent)):
        with pytest.raises(
            UserError, match=f"a.{kind} is a .* photo, and the package {package} cannot be imported"
        ) as e:
            read(path)
        assert "setup.sh" in str(e.value)


def test_packages_are_imported_only_for_such_photos(tmp_path):
    save(tmp_path, "a.png", Image.new("RGB", (4, 4)))
    code = "import sys; from utils.dataset import InstanceDataset; InstanceDataset(sys.argv[1], 4)\n"
    code += "print({'pillow_heif', 'pillow_jxl'} & set(sys.modules))"
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("name", ["a.heic", "b.AVIF", "c.jxl", "d.hif", "e.jpg", "f.png", "g.webp", "h.tiff"])
def test_what_is_called_so_and_is_something_else_is_refused(tmp_path, name):
    save(tmp_path, "good.png", Image.new("RGB", (4, 4)))
    (tmp_path / name).write_bytes(b"something else altogether")
    with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
        find_photos(tmp_path)


def refused(path) -> str:
    for read in (decode, lambda path: find_photos(path.parent)):
        with pytest.raises(UserError, match="is a camera raw photo .*develop it") as error:
            read(path)
        assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", RAW_SUFFIXES)
def test_camera_raw_by_its_name(tmp_path, suffix):
    image = tmp_path / f"DSC_0001{suffix.upper()}"
    Image.new("RGB", (160, 120)).save(image, "TIFF")
    assert f"({suffix[1:].upper()})" in refused(image)


@pytest.mark.parametrize("magic", RAW_MAGIC)
@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_camera_raw_by_its_first_bytes(tmp_path, magic, name):
    (tmp_path / name).write_bytes((bytes(magic[0]) + magic[1]).ljust(400, b"\0"))
    assert f"({RAW_MAGIC[magic]})" in refused(tmp_path / name)


def test_an_ordinary_tiff_is_read(tmp_path):
    """With the camera's EXIF and maker's note kept, of several pages, with a thumbnail after it, or large-file."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[271], tags[272] = "NIKON CORPORATION", "NIKON D850"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[37500] = b"Nikon\0" + bytes(100)
    picture = Image.fromarray(upright_picture())
    save(tmp_path, "a.tif", picture, tiffinfo=tags)
    save(tmp_path, "b.tif", picture, exif=exif)
    save(tmp_path, "c.tif", picture, save_all=True, append_images=[picture, picture])
    save(tmp_path, "d.tif", picture, big_tiff=True)
    save(tmp_path, "e.tif", picture, compression="jpeg", quality=100)
    thumbnail = picture.resize((16, 8))
    thumbnail.encoderinfo = dict(tiffinfo={254: 1})
    save(tmp_path, "f.tif", picture, save_all=True, append_images=[thumbnail])
    for photo in InstanceDataset(tmp_path, 32).photos:
        assert np.abs(photo.pixels.transpose(1, 2, 0).astype(int) - upright_picture())[::31, ::63].max() <= 3
