"""A file is there whole or not at all."""

import pytest
from PIL import Image

from utils.files.atomic import replace_file, save_png


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
