"""What is said of tests that were left out, and which reasons CI may have."""

import io
import os
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest

from tests.helpers import skips


def report(reason: str) -> SimpleNamespace:
    return SimpleNamespace(longrepr=("tests/test_a.py", 1, f"Skipped: {reason}"))


def item(mark: str) -> SimpleNamespace:
    return SimpleNamespace(get_closest_marker=lambda name: name == mark)


def test_each_reason_has_a_line_with_what_runs_the_test():
    stats = dict(skipped=[report("says something about Triton only")] * 2 + [report("it rains")])
    lines = skips.lines(stats | dict(deselected=[item("gpu"), item("slow"), item("slow")]))
    assert "skipped 2: says something about Triton only; runs with: bash test.sh --interpreted" in lines
    assert "skipped 1: it rains; runs with: nothing known: add the reason to tests/helpers/skips.py" in lines
    assert "not asked for 2: slow; run with: bash test.sh -m slow" in lines and len(lines) == 4
    assert skips.unexpected(stats) == ["it rains"] and skips.lines({}) == []


@pytest.mark.parametrize(("reason", "code"), [("needs a CUDA GPU", 0), ("it rains", 1)])
def test_strict_runs_fail_on_a_reason_that_is_not_allowed(tmp_path, reason, code):
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_sessionfinish  # noqa: F401\n")
    (tmp_path / "test_it.py").write_text(f"import pytest\n\n\ndef test_it():\n    pytest.skip({reason!r})\n")
    child = os.fork()  # which has torch imported, as the conftest needs it
    if child == 0:
        os.environ["STRICT_SKIPS"] = "1"
        os.chdir(tmp_path)
        with redirect_stdout(io.StringIO()):
            os._exit(pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
