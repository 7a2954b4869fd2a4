"""What is printed fits a terminal; a log gets whole lines, and a command is never broken."""

import os
import sys

import pytest

from utils.runtime import terminal


@pytest.mark.parametrize(("given", "used"), [(80, 80), (200, 100)])
def test_a_terminal_gets_lines_that_fit(given, used, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: os.terminal_size((given, 24)))
    lines = terminal.wrapped("words and --a-flag " * 30).splitlines()
    assert max(map(len, lines)) <= used and len(lines) >= 570 // used
    assert " ".join(lines).split() == ("words and --a-flag " * 30).split()
    assert terminal.wrapped("  python -m " + "x " * 200) == "  python -m " + "x " * 200


def test_a_log_gets_whole_lines():
    assert terminal.wrapped("words " * 100) == "words " * 100
