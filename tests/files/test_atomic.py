"""Files are whole or not there; file systems that cannot sync, set permissions, rename or tell Cat from cat."""

import errno
import os
import pathlib
import shutil
import stat
from pathlib import Path

import pytest
from PIL import Image

from utils.files import atomic
from utils.files.atomic import copy_into, move, replace_path, sync, sync_tree
from utils.files.json_files import keep_rows, write_json
from utils.files.png import save_png


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(atomic, "_said", set())


def refusing(number: int, when=lambda *args: True, then=None):
    """A function of os that answers with an error, if `when(*args)`, and else does what `then` does."""

    def function(*args, **kwargs):
        if when(*args):
            raise OSError(number, os.strerror(number))
        return then(*args, **kwargs)

    return function


def for_the_owner_alone(part) -> None:
    """Writes a file as tempfile does."""
    part.unlink()
    part.touch(0o600)


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_one_note(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(os, "fsync", refusing(number, is_folder, os.fsync))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("x")
    sync_tree(tmp_path)
    sync(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("note: ") and "cannot sync folders" in said


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refusing(number))
    with pytest.raises(OSError) as error:
        sync(tmp_path)
    assert error.value.errno == number


def test_permissions_that_cannot_be_set_are_one_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pathlib.Path, "chmod", refusing(errno.EPERM))

    for name in "ab":
        replace_path(tmp_path / name, for_the_owner_alone)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot set permissions" in said
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.ENOSYS, errno.EINVAL])
@pytest.mark.parametrize("ever", [False, True])
def test_no_rename_over_a_file_that_is_there(tmp_path, monkeypatch, capsys, number, ever):
    """`ever`: nothing can be renamed, as in a mounted bucket."""
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    there = refusing(number, lambda source, target: ever or os.path.exists(target), os.rename)
    monkeypatch.setattr(os, "replace", there)
    monkeypatch.setattr(os, "rename", there)
    move(tmp_path / "new", tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "new"
    assert "cannot rename" in capsys.readouterr().err


def test_a_folder_of_a_lower_layer_is_copied(tmp_path, monkeypatch):
    """An overlay answers EXDEV to a rename of a folder that came with the image."""
    (tmp_path / "unet/deep").mkdir(parents=True)
    (tmp_path / "unet/deep/file").write_text("weights")
    monkeypatch.setattr(os, "replace", refusing(errno.EXDEV))
    move(tmp_path / "unet", tmp_path / "replaced")
    assert os.listdir(tmp_path) == ["replaced"] and (tmp_path / "replaced/deep/file").read_text() == "weights"


def test_a_folder_that_cannot_be_copied_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/a").write_text("a")
    monkeypatch.setattr(os, "replace", refusing(errno.EXDEV))
    monkeypatch.setattr(shutil, "copyfile", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        move(tmp_path / "unet", tmp_path / "moved")
    assert os.listdir(tmp_path) == ["unet"] and (tmp_path / "unet/a").read_text() == "a"


def test_a_full_disk_is_no_reason_to_copy(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("new")
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        move(tmp_path / "new", tmp_path / "old")


def test_a_copy_is_a_file_of_its_own(tmp_path):
    (tmp_path / "base").write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to("base")
    copy_into(tmp_path / "link", tmp_path / "deep/copy")
    copy = tmp_path / "deep/copy"
    assert copy.read_bytes() == b"x" * 5000 and not copy.is_symlink() and copy.stat().st_nlink == 1
    copy.write_bytes(b"y")
    assert (tmp_path / "base").read_bytes() == b"x" * 5000


def test_save_png_keeps_text_of_any_script(tmp_path):
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), dict(prompt="фото 猫 🐈", seed=3, negative_prompt=None))
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"prompt": "фото 猫 🐈", "seed": "3"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    replace_path(path, lambda part: part.write_bytes(b"old"))

    def fail(part):
        part.write_bytes(b"ne")
        raise OSError("disk full")

    for is_shared in (False, True):
        with pytest.raises(OSError, match="disk full"):
            replace_path(path, fail, is_shared=is_shared)
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_usual_permissions_whoever_makes_it(tmp_path, umask):
    before = os.umask(umask)
    try:
        replace_path(tmp_path / "a", for_the_owner_alone)
        replace_path(tmp_path / "b", lambda part: part.write_bytes(b"b"), is_shared=True)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {0o666 & ~umask}


@pytest.mark.parametrize("write", [lambda path: write_json(path, {}), lambda path: keep_rows(path, 0, set())])
def test_json_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch, write):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write(tmp_path / "a")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("plant", [Path.write_text, lambda part, text: part.symlink_to(part.parent / "theirs")])
@pytest.mark.parametrize("is_shared", [False, True])
def test_what_a_killed_process_left_goes_and_a_link_in_its_place_is_not_followed(tmp_path, plant, is_shared):
    (tmp_path / "theirs").write_text("theirs")
    plant(tmp_path / (f".a.{os.getpid()}.part" if is_shared else ".a.part"), "half")
    replace_path(tmp_path / "a", lambda part: part.write_text("whole"), is_shared=is_shared)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "theirs"]
    assert (tmp_path / "a").read_text() == "whole" and (tmp_path / "theirs").read_text() == "theirs"
