"""JSON files hold whatever a file name or a prompt holds."""

import json
import os

from utils.files import json_files


def test_file_names_that_are_not_utf8_can_be_written_to_json(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    json_files.write_json(tmp_path / "a.json", {"file": name, "prompt": "кот 🐈\n"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"file": name, "prompt": "кот 🐈\n"}
    assert "кот 🐈" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_rows_that_are_damaged_or_later_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 0.5, "skipped": False} for step in (1, 2, 3)]
    lines = [json.dumps(row) + "\n" for row in (rows[0], rows[1], rows[1], {"step": 2.5}, rows[2])]
    path.write_text("".join(lines) + '[1]\n"x"\n{"step": "2"}\n{"step": 3, "lo')
    assert json_files.keep_rows(path, 2, {"loss", "skipped"}) == rows[:2]
    assert json_files.read_rows(path) == rows[:2]
    assert json_files.keep_rows(path, 0, {"loss"}) == json_files.read_rows(path) == []


def test_an_object_or_none(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    assert json_files.read_json_or_none(tmp_path / "list.json") is None
    assert json_files.read_json_or_none(tmp_path / "missing.json") is None
    json_files.write_json(tmp_path / "a.json", {"a": 1})
    assert json_files.read_json_or_none(tmp_path / "a.json") == {"a": 1}
