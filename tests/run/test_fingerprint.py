"""What a run is made from, as far as a resumed run compares it."""

from pathlib import Path
from types import SimpleNamespace

from utils.run.fingerprint import photo_hashes
from utils.run.resume import differences


def test_captions_and_folders_are_part_of_what_a_resumed_run_compares(tmp_path):
    def photo(path: str, prompt: str) -> SimpleNamespace:
        return SimpleNamespace(path=Path(path), sha256="abc", prompt=prompt)

    assert photo_hashes([photo("a/1.jpg", "my cat")], "my cat") == {"1.jpg": "abc"}
    assert photo_hashes([photo("a/1.jpg", "asleep")], "my cat") == {"1.jpg": "abc 'asleep'"}
    two = photo_hashes([photo("a/1.jpg", "my cat"), photo("b/1.jpg", "my dog")], None)
    assert two == {"a/1.jpg": "abc 'my cat'", "b/1.jpg": "abc 'my dog'"}


def test_differences_of_groups():
    old = dict(num_ranks=1, arguments=dict(a=1), photos=dict(x="1", y="2"))
    new = dict(num_ranks=2, arguments=dict(a=1, b=2), photos=dict(y="3"))
    assert differences(old, old) == []
    expected = ["--b: None -> 2", "num_ranks: 1 -> 2", "photos: 'x' has gone", "photos: 'y' has changed"]
    assert differences(old, new) == expected
