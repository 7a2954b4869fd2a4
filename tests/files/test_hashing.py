"""utils/hashing.py: several files at once, each read once."""

import hashlib
import os

import pytest

from utils import hashing


def test_a_file_with_two_names_is_read_once(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.bin").write_bytes(bytes([number]) * 3_000_000)
    os.link(tmp_path / "0.bin", tmp_path / "again.bin")
    read, calls = hashing._read, []
    monkeypatch.setattr(hashing, "_read", lambda path: (calls.append(path), read(path))[1])
    paths = sorted(tmp_path.iterdir())
    digests = hashing.sha256_of_all(paths)
    assert digests == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(calls) == 3


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(OSError, match="gone"):
        hashing.sha256_of_all([tmp_path / "gone"])
