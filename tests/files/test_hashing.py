"""SHA-256 of files: several at once, each read once."""

import hashlib
import os

import pytest

from tests.helpers.script import LATEST, UNET_FILE, as_argv, run
from train_dreambooth_colossalai import main
from utils.files import hashing
from utils.run import resume


def test_a_file_with_two_names_is_read_once(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.bin").write_bytes(bytes([number]) * 3_000_000)
    os.link(tmp_path / "0.bin", tmp_path / "again.bin")
    read, calls = hashing.sha256_of, []
    monkeypatch.setattr(hashing, "sha256_of", lambda path: (calls.append(path), read(path))[1])
    paths = sorted(tmp_path.iterdir())
    digests = hashing.sha256_of_all(paths)
    assert digests == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(calls) == 3


def test_a_file_that_cannot_be_read_is_an_error_where_its_digest_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        hashing.sha256_of_all([tmp_path / "gone"])
    in_background = hashing.in_background(hashing.sha256_of, tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        in_background.result(5)


def test_a_resume_reads_each_file_of_the_base_once(flags, base, monkeypatch):
    flags["pretrained_model_name_or_path"] = base
    run(flags, checkpointing_steps=2)
    hashed, read = [], resume.sha256_of
    monkeypatch.setattr(resume, "sha256_of", lambda path: hashed.append(path) or read(path))
    assert main(as_argv(flags | LATEST)) == 0
    hashed = [path for path in hashed if base in path.parents]
    assert base / UNET_FILE in hashed and len(hashed) == len(set(hashed)) > 8
