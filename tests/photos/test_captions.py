"""Captions beside photos: which are found, and what is said of those that are of no photo."""

import json
import unicodedata
from pathlib import Path

import pytest

from tests.helpers.pipelines import write_photos
from utils.dataset import InstanceDataset
from utils.errors import UserError


@pytest.fixture
def photos(tmp_path) -> Path:
    """photo-0.jpg to photo-2.jpg."""
    return write_photos(tmp_path / "photos", 3)


def prompts(folder: Path) -> list[str]:
    dataset = InstanceDataset(folder, 16, prompt="a cat")
    assert dataset.skipped == []
    return [photo.prompt for photo in dataset.photos]


def metadata(folder: Path, *entries: object, name: str = "metadata.jsonl") -> None:
    (folder / name).write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries) + "\n")


NAMES = "photo-1.txt photo-1.TXT photo-1.caption photo-1.Caption photo-1.jpg.txt photo-1.jpg.caption PHOTO-1.txt"


@pytest.mark.parametrize("name", [*NAMES.split(), "Photo-1.JPG.TXT"])
def test_a_caption_by_its_name(photos, name):
    (photos / name).write_text(" a cat\n on a beach \n", encoding="utf-8-sig")
    assert prompts(photos) == ["a cat", "a cat on a beach", "a cat"]
    assert InstanceDataset(photos, 16).num_captions == 1


@pytest.mark.parametrize(("of_photo", "of_caption"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_either_unicode_form_of_a_name(photos, of_photo, of_caption, kind):
    photo = unicodedata.normalize(of_photo, "photo-1 café.jpg")
    (photos / "photo-1.jpg").rename(photos / photo)
    name = unicodedata.normalize(of_caption, "photo-1 café.jpg")
    if kind == "txt":
        (photos / name).with_suffix(".txt").write_text("a café")
    else:
        metadata(photos, dict(file_name=name, text="a café"))
    assert prompts(photos) == ["a cat", "a café", "a cat"]


def test_names_that_differ_in_case_alone_keep_their_own(tmp_path):
    folder = write_photos(tmp_path / "photos", 1)
    (folder / "photo-0.jpg").rename(folder / "a.jpg")
    (folder / "A.jpg").write_bytes((folder / "a.jpg").read_bytes())
    if len(list(folder.iterdir())) < 2:
        pytest.skip("this file system takes them for one")
    (folder / "a.txt").write_text("small")
    (folder / "A.txt").write_text("large")
    assert prompts(folder) == ["large", "small"]


@pytest.mark.parametrize("field", ["text", "prompt", "caption"])
def test_metadata_jsonl(photos, field):
    metadata(
        photos, {"file_name": "photo-2.jpg", field: " on a\tbeach"}, "", dict(file_name="./photo-0.jpg", text="x")
    )
    assert prompts(photos) == ["x", "a cat", "on a beach"]


def test_the_same_caption_twice_is_one(photos):
    (photos / "photo-0.txt").write_text("asleep")
    (photos / "photo-0.caption").write_text("asleep\n")
    metadata(photos, dict(file_name="photo-0.jpg", text="asleep", prompt="asleep"))
    assert prompts(photos) == ["asleep", "a cat", "a cat"]


def complaint(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        InstanceDataset(folder, 16)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("other", ["photo-0.caption", "photo-0.jpg.txt", "metadata.jsonl"])
def test_two_that_differ_are_refused(photos, other):
    (photos / "photo-0.txt").write_text("asleep")
    (photos / other).write_text("awake" if "photo" in other else '{"file_name": "photo-0.jpg", "text": "awake"}')
    said = complaint(photos)
    assert "photo-0.jpg has two captions that differ" in said and other in said and "photo-0.txt" in said


@pytest.mark.parametrize(
    "name", ["photo-7.txt", "photo-1.caption", "IMG_1.TXT", "captions.txt", "photo-0 (1).txt", "prompt.txt"]
)
def test_a_caption_of_no_photo_is_refused(photos, name):
    (photos / "photo-1.jpg").unlink()
    (photos / name).write_text("asleep")
    said = complaint(photos)
    assert name in said and "there is no photo called" in said


@pytest.mark.parametrize(
    "name",
    ["captions.json", "metadata.csv", "metadata.parquet", "photo-0.tags", "photo-0.cap", "train.jsonl", "prompts.csv"],
)
def test_captions_of_a_kind_that_is_not_read_are_refused(photos, name):
    (photos / name).write_text("asleep")
    said = complaint(photos)
    assert name in said and "is not read" in said and "metadata.jsonl" in said


@pytest.mark.parametrize("name", ["README.txt", "license.txt", "notes.txt", "references_and_licenses.txt", "x.json"])
def test_a_text_about_the_folder_is_no_caption(photos, name):
    (photos / name).write_text("found on a beach")
    dataset = InstanceDataset(photos, 16)
    assert [(path.name, reason) for path, reason in dataset.skipped] == [(name, "not an image")]
    assert dataset.num_captions == 0


def test_a_photo_of_such_a_name_keeps_its_caption(photos):
    (photos / "photo-1.jpg").rename(photos / "notes.jpg")
    (photos / "notes.txt").write_text("a notebook")
    assert prompts(photos) == ["a notebook", "a cat", "a cat"]


def test_a_hidden_one_is_none(photos):
    (photos / "._photo-0.txt").write_bytes(b"\0\5\26\7")
    assert [photo.prompt for photo in InstanceDataset(photos, 16, prompt="a cat").photos] == ["a cat"] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, is not JSON"),
        ("[]", "line 2, needs a file_name and one text or prompt"),
        ('{"file_name": "photo-1.jpg"}', "line 2, needs a file_name and one text"),
        ('{"file_name": "photo-1.jpg", "text": " "}', "line 2, needs a file_name and one text"),
        ('{"file_name": "photo-1.jpg", "text": "a", "prompt": "b"}', "line 2, needs a file_name and one text"),
        ('{"text": "a"}', "line 2, needs a file_name"),
        ('{"file_name": "photo-9.jpg", "text": "a"}', "line 2: there is no photo 'photo-9.jpg'"),
        ('{"file_name": "train/photo-1.jpg", "text": "a"}', "line 2: there is no photo 'train/photo-1.jpg'"),
    ],
)
def test_metadata_that_says_nothing(photos, line, message):
    metadata(photos, dict(file_name="photo-0.jpg", text="a cat"), line)
    assert message in complaint(photos)


@pytest.mark.parametrize(("content", "message"), [(b" \n", "is empty"), (b"\xff\xfe\x00", "cannot be read as UTF-8")])
@pytest.mark.parametrize("name", ["photo-2.txt", "photo-2.caption"])
def test_a_caption_that_says_nothing(photos, name, content, message):
    (photos / name).write_bytes(content)
    assert f"{name}, the caption of photo-2.jpg, {message}" in complaint(photos)


def test_a_caption_behind_a_broken_link(photos, tmp_path):
    (photos / "photo-0.txt").symlink_to(tmp_path / "nowhere")
    assert "photo-0.txt, the caption of photo-0.jpg, is not a file that can be read" in complaint(photos)


def test_words_that_begin_like_an_image_format_are_words(photos):
    (photos / "photo-0.txt").write_text("P6 9 9 255 on the mug")
    assert prompts(photos)[0] == "P6 9 9 255 on the mug"
