"""Packages that are imported when something uses them."""

import gc
import importlib
import inspect
import sys
from pathlib import Path

import pytest

from utils.runtime import aside

INIT = """
import standing.part
COUNT.append(__name__)
value = 1
"""
PART = """
COUNT.append(__name__)
value = 2
"""


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """The names of the modules of the package `standing` that have been executed, in their order."""
    count: list[str] = []
    (tmp_path / "standing").mkdir()
    (tmp_path / "standing/__init__.py").write_text(INIT)
    (tmp_path / "standing/part.py").write_text(PART)
    monkeypatch.setattr("builtins.COUNT", count, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield count
    for name in [name for name in sys.modules if name.partition(".")[0] == "standing"]:
        del sys.modules[name]


def test_what_is_asked_is_answered_and_nothing_is_imported(imported):
    aside.set_aside("standing", answer=3)
    import standing

    assert standing.answer == 3 and imported == []
    assert inspect.getmodule(lambda: None) is not None and not hasattr(standing, "__wrapped__")
    assert imported == []


def test_anything_else_imports_it(imported):
    aside.set_aside("standing", answer=3)
    import standing

    assert standing.value == 1 and imported == ["standing.part", "standing"]
    assert type(sys.modules["standing"]) is not aside.Aside
    with pytest.raises(AttributeError):
        _ = standing.nothing


def test_a_submodule_imports_it_and_comes_once(imported):
    aside.set_aside("standing")
    import standing.part

    assert imported == ["standing.part", "standing"]
    assert standing.part.value == 2 and sys.modules["standing.part"].__spec__.origin.endswith("part.py")
    assert sys.modules["standing"].part is sys.modules["standing.part"]


def test_a_submodule_stands_aside_with_its_package(imported):
    aside.set_aside("standing")
    aside.set_aside("standing.part", answer=4)
    from standing import part

    assert part.answer == 4 and imported == []
    assert part.value == 2 and imported == ["standing.part", "standing"]


def test_what_is_not_there_stays_so():
    aside.set_aside("no_such_package")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package")


def test_what_is_imported_is_left_alone(imported):
    import standing

    aside.set_aside("standing", value=5)
    assert sys.modules["standing"] is standing and standing.value == 1


def test_a_closed_package_opens_when_something_of_it_is_asked_for(imported):
    (Path(sys.path[0]) / "standing/__init__.py").write_text("")
    importlib.import_module("standing")
    folder = Path(sys.path[0]) / "standing/closed"
    folder.mkdir()
    (folder / "__init__.py").write_text("COUNT.append(__name__)\nfrom .one import value\nfrom . import other\n")
    for name in ("one", "other"):
        (folder / f"{name}.py").write_text(f"COUNT.append(__name__)\nvalue = {name!r}\n")
    aside.keep_closed("standing.closed")
    from standing.closed.one import value

    assert value == "one" and imported == ["standing.closed.one"]
    closed = sys.modules["standing.closed"]
    assert closed.value == "one" and imported[1:] == ["standing.closed", "standing.closed.other"]
    with pytest.raises(AttributeError):
        _ = closed.something_else
    aside.keep_closed("standing.closed")
    aside.keep_closed("standing.no_such_package")
    assert sys.modules["standing.closed"] is closed and "standing.no_such_package" not in sys.modules


def test_nothing_is_collected_only_inside():
    assert gc.isenabled()
    with aside.nothing_collected():
        assert not gc.isenabled()
        with aside.nothing_collected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_shapes_of_plain_numbers_need_no_symbols():
    answers = {}
    for name, values, expected in [
        ("expect_true", (True,), True),
        ("guard_or_false", (False,), False),
        ("sym_eq", ((2, 3), (2, 3)), True),
        ("sym_eq", ((2, 3), (2, 4)), False),
        ("is_nested_int", (7,), False),
    ]:
        answers[name] = getattr(importlib.import_module(aside.SHAPES), name)
        assert answers[name](*values) is expected
