"""Progress bars: a rate and the time left, in a log too, and one module that makes them."""

import io
import sys

from tests.test_architecture import imported, modules
from utils.runtime.progress import progress_bar


def test_a_bar_says_how_far_how_fast_and_how_long(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("class images", 40, "image", done=10) as bar:
        bar.update(30)
        bar.refresh()
        said = sys.stderr.getvalue()
    assert "class images:  25%" in said and "10/40 [" in said
    assert "40/40 [" in said and "image/s]" in said and "<00:00" in said


def test_what_is_not_to_be_shown_is_not(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("drawing", 4, "step", shown=False) as bar:
        bar.update(4)
    assert sys.stderr.getvalue() == ""


def test_one_module_makes_them():
    assert {name for name, tree in modules().items() if "tqdm" in imported(tree)} == {"runtime.progress"}
