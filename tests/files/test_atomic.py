"""A file is there whole or not at all."""

import os
import stat

import pytest
from PIL import Image

from utils.files.atomic import replace_file, replace_path
from utils.files.json_files import keep_rows, write_json
from utils.files.png import save_png


def test_save_png_keeps_text_of_any_script(tmp_path):
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), dict(prompt="фото 猫 🐈", seed=3, negative_prompt=None))
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"prompt": "фото 猫 🐈", "seed": "3"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    replace_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_usual_permissions_whoever_makes_it(tmp_path, umask):
    def for_the_owner_alone(part):
        part.unlink()
        part.touch(0o600)

    before = os.umask(umask)
    try:
        replace_path(tmp_path / "a", for_the_owner_alone)
        replace_file(tmp_path / "b", lambda file: file.write(b"b"))
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


def test_what_a_killed_process_left_is_used_again(tmp_path):
    (tmp_path / ".a.json.part").write_text("half")
    write_json(tmp_path / "a.json", {"whole": True})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
