"""The photo folder: what is read, what is skipped, what is refused, and which pixels come out."""

import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.photos import as_stored, save, turned, upright_picture
from tests.helpers.pipelines import write_photos
from utils.dataset import InstanceDataset, decode, find_photos, resize_shorter_side
from utils.errors import UserError


def test_the_size_that_is_recorded_is_the_upright_one(tmp_path):
    save(tmp_path, "photo.jpg", Image.fromarray(as_stored(upright_picture(), 6)), exif=turned(6))
    dataset = InstanceDataset(tmp_path, 16)
    assert dataset.photos[0].original_size == (64, 32)
    assert dataset.photos[0].pixels.shape == (3, 16, 32)
    assert dataset.photos[0].sha256 == hashlib.sha256((tmp_path / "photo.jpg").read_bytes()).hexdigest()


def test_what_is_no_photo_is_skipped_and_reported(tmp_path):
    folder = write_photos(tmp_path / "photos", 1)
    for name in (".DS_Store", ".hidden.jpg", "._photo-0.jpg", "Thumbs.db", "notes.txt", "licence.pdf", "empty"):
        (folder / name).write_bytes(b"" if name == "empty" else b"no image")
    (folder / "more.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "up").symlink_to("..")
    photos, skipped = find_photos(folder)
    assert [path.name for path in photos] == ["photo-0.jpg"]
    assert {path.name: reason for path, reason in skipped} == {
        ".DS_Store": "hidden",
        ".hidden.jpg": "hidden",
        "._photo-0.jpg": "hidden",
        "Thumbs.db": "not an image",
        "notes.txt": "not an image",
        "licence.pdf": "not an image",
        "empty": "not an image",
        "more.jpg": "a folder",
        "fifo.jpg": "not a regular file",
        "broken.jpg": "not a regular file",
        "loop.jpg": "not a regular file",
        "up": "a folder",
    }
    assert InstanceDataset(folder, 16).skipped == skipped


def test_a_photo_behind_a_link_is_read(tmp_path):
    elsewhere = write_photos(tmp_path / "elsewhere", 1)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "link.jpg").symlink_to(elsewhere / "photo-0.jpg")
    assert len(InstanceDataset(folder, 16)) == 1


@pytest.mark.parametrize("name", ["photo", "a b\nc.png", "кот 🐈.jpeg", b"caf\xe9.png", "-rf.png", "photo.data"])
def test_any_file_name_will_do(tmp_path, name):
    image = Image.fromarray(upright_picture())
    with open(os.path.join(os.fsencode(tmp_path), os.fsencode(name)), "wb") as file:
        image.save(file, "png")
    dataset = InstanceDataset(tmp_path, 16)
    assert len(dataset) == 1 and dataset.skipped == []


def test_photos_are_sorted_by_name(tmp_path):
    for name in ("b.png", "a.png", "B.png", "10.png", "9.png"):
        save(tmp_path, name, Image.new("RGB", (4, 4)))
    assert [path.name for path in find_photos(tmp_path)[0]] == ["10.png", "9.png", "B.png", "a.png", "b.png"]


def test_a_photo_without_read_permission_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    path = save(tmp_path, "mine.png", Image.new("RGB", (4, 4)))
    monkeypatch.setattr("utils.dataset.Image.open", refuse)
    with pytest.raises(UserError, match="mine.png cannot be read: .*Permission denied"):
        find_photos(tmp_path)
    with pytest.raises(UserError, match="mine.png cannot be decoded: .*Permission denied"):
        decode(path)


def test_no_folder_no_photo(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*missing"):
        InstanceDataset(tmp_path / "missing", 16)
    with pytest.raises(UserError, match="no photo in .*; JPEG"):
        InstanceDataset(tmp_path, 16)
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match="no photo in .*; it holds only notes.txt"):
        InstanceDataset(tmp_path, 16)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match="there is no folder .*circle"):
        InstanceDataset(tmp_path / "circle", 16)
    with pytest.raises(UserError, match="there is no folder .*notes.txt"):
        InstanceDataset(tmp_path / "notes.txt", 16)


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((640, 480), 512, (682, 512)),
        ((480, 640), 512, (512, 682)),
        ((1458, 729), 64, (128, 64)),  # 1458 * (64 / 729) is 127.99999999999999
        ((4032, 3024), 512, (682, 512)),
        ((10, 10), 64, (64, 64)),
        ((5, 7), 64, (64, 89)),
    ],
)
def test_the_shorter_side_becomes_the_resolution(size, resolution, expected):
    assert resize_shorter_side(Image.new("RGB", size), resolution).size == expected


def test_resizing_keeps_fine_detail_and_no_finer_one():
    """Of stripes three pixels of the result wide 95% is left (by a bilinear filter 69%), of half a pixel nothing."""
    for period, least, most in ((30, 90, 100), (5, 0, 3)):
        stripes = 127.5 + 100 * np.cos(2 * np.pi * (np.arange(640) + 0.5) / period)
        wide = np.broadcast_to(stripes.round().astype(np.uint8)[None, :, None], (640, 640, 3))
        resized = np.array(resize_shorter_side(Image.fromarray(wide.copy()), 64)).astype(float)
        assert least <= resized[32, 8:-8, 0].std() * 2**0.5 <= most


@pytest.mark.parametrize(("spare", "expected"), [(1, 0), (3, 2), (5, 2), (10, 5)])
def test_center_crop_takes_the_middle_rounded_as_in_the_recipes_transform(tmp_path, spare, expected):
    save(tmp_path, "wide.png", Image.new("RGB", (16 + spare, 16)))
    assert InstanceDataset(tmp_path, 16, center_crop=True).crop_origin(0, (0.9, 0.9)) == (0, expected)


@pytest.mark.parametrize(("size", "axis"), [((24, 16), 1), ((16, 24), 0)])
def test_random_crops_cover_every_place_evenly(tmp_path, size, axis):
    save(tmp_path, "photo.png", Image.new("RGB", size))
    dataset = InstanceDataset(tmp_path, 16)
    positions = np.linspace(0, 1, 900, endpoint=False)
    origins = [dataset.crop_origin(0, (p, p)) for p in positions]
    assert {origin[1 - axis] for origin in origins} == {0}
    assert np.bincount([origin[axis] for origin in origins]).tolist() == [100] * 9
    assert dataset.crop_origin(0, (np.nextafter(1, 0),) * 2)[axis] == 8
    assert [dataset.crop_origin(0, (p, p)) for p in positions] == origins


def test_pixel_values(tmp_path):
    picture = upright_picture(32, 64)
    save(tmp_path, "photo.png", Image.fromarray(picture))
    dataset = InstanceDataset(tmp_path, 32)
    values = dataset.pixel_values(0, 0, 3)
    assert values.dtype == torch.float32 and values.shape == (3, 32, 32)
    expected = (torch.from_numpy(picture[:, 3:35]).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    assert values.min() == -1 and values.max() == 1


def test_photos_are_decoded_once(tmp_path):
    folder = write_photos(tmp_path / "photos", 1)
    dataset = InstanceDataset(folder, 16)
    (folder / "photo-0.jpg").unlink()
    before = dataset.photos[0].pixels.copy()
    dataset.pixel_values(0, 0, 0).zero_()
    assert np.array_equal(dataset.photos[0].pixels, before)


@pytest.mark.parametrize(
    ("sizes", "center_crop", "expected"),
    [
        ([(20, 20), (40, 40)], False, True),
        ([(20, 20), (24, 20)], False, False),
        ([(20, 20), (24, 20)], True, True),
        ([(4001, 4000)], False, True),  # 16 x 16 once resized
    ],
)
def test_fixed_crops(tmp_path, sizes, center_crop, expected):
    for number, size in enumerate(sizes):
        save(tmp_path, f"{number}.png", Image.new("RGB", size))
    assert InstanceDataset(tmp_path, 16, center_crop).has_fixed_crops is expected


def test_a_photo_that_is_transparent_everywhere_is_white_and_noted(tmp_path):
    save(tmp_path, "a.png", Image.new("RGBA", (64, 32), (200, 0, 0, 0)))
    (photo,) = InstanceDataset(tmp_path, 32).photos
    assert photo.notes == ("transparent everywhere: only white is left",) and (photo.pixels == 255).all()
