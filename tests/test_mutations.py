"""The list of wrong lines follows the program, and what is done with one."""

import pytest

from tests import mutations, processors
from tests.helpers.script import ROOT
from tests.mutations import MUTATIONS, Mutation

CODE, TEST = (
    "def add(a, b):\n    return a + b\n",
    "from code_ import add\n\n\ndef test_add():\n    assert add(2, 2) == {}\n",
)


@pytest.mark.slow
def test_every_line_is_there():
    """In the slow run: whoever changes a line of the list is not stopped by that."""
    texts = {mutation.file: (ROOT / mutation.file).read_text() for mutation in MUTATIONS}
    assert [mutation.name for mutation in MUTATIONS if texts[mutation.file].count(mutation.old) != 1] == []


def test_the_list_names_what_there_is():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names) >= 60
    paths = {word for mutation in MUTATIONS for word in mutation.tests.split() if word.startswith("tests/")}
    assert [path for path in paths | set(processors.NUMERIC) if not (ROOT / path).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "expected", "found"),
    [
        ("a + b", 4, "SURVIVED"),  # 2 * 2 is 4, too
        ("a + b", 5, "caught"),
        ("a - b", 4, "NOT THERE"),
        ("a + b", "(", "NO TEST RAN (pytest's exit code 2)"),
    ],
)
def test_what_becomes_of_a_wrong_line(tmp_path, monkeypatch, old, expected, found):
    def copy_tree(target):
        (target / "code_.py").write_text(CODE)
        (target / "test_it.py").write_text(TEST.format(expected))
        (target / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\n")

    monkeypatch.setattr(mutations, "copy_tree", copy_tree)
    assert mutations.outcome(Mutation("add", "code_.py", old, "a * b", "test_it.py")) == found
