"""JSON files hold whatever a file name or a prompt holds."""

import json
import os

from utils.files import json_files


def test_file_names_that_are_not_utf8_can_be_written_to_json(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    json_files.write_json(tmp_path / "a.json", {"file": name, "prompt": "кот 🐈\n"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"file": name, "prompt": "кот 🐈\n"}
    assert "кот 🐈" in (tmp_path / "a.json").read_text(encoding="utf-8")
