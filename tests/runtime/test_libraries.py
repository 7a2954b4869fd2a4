"""What the imports of the libraries change and change back, what they leave out, and what they let be heard."""

import json
import warnings

from utils.runtime.libraries import DEPRECATIONS, quiet_imports, quiet_libraries

import pytest
import torch

from tests.helpers.script import ROOT, run_python

# One process that answers for evaluation first, which must do without ColossalAI, and then for training.
QUESTIONS = """
import importlib.metadata, json, sys, torch
before = torch.compile, importlib.metadata.packages_distributions
import utils.evaluation.generate, utils.evaluation.score
answers = dict(evaluation=[name for name in sys.modules if name.partition(".")[0] == "colossalai"])
import utils.runtime.colossal
answers["training"] = "colossalai" in sys.modules
answers["as it was"] = before == (torch.compile, importlib.metadata.packages_distributions)
answers["absent"] = [name for name, module in sys.modules.items() if module is None and "." not in name]
answers["modules"] = list(sys.modules)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict:
    result = run_python(QUESTIONS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_imports_leave_nothing_behind(answers):
    assert answers["as it was"] and answers["absent"] == []
    assert not [name for name in answers["modules"] if name.startswith("galore_torch")]


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="older libraries import more")
def test_what_nothing_uses_is_not_imported(answers):
    unused = {"torch._inductor.compile_fx", "peft", "bitsandbytes", "sklearn", "pandas", "torchvision"}
    assert unused.isdisjoint(answers["modules"])


def test_evaluation_does_without_colossalai(answers):
    assert answers["evaluation"] == [] and answers["training"]


def test_folders_named_like_parts_of_scipy_are_only_folders(tmp_path):
    """The libraries look for scipy, which need not be there; once every run in such a folder ended in a KeyError."""
    for name in ("stats", "integrate"):
        (tmp_path / name).mkdir()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import utils.runtime.colossal"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("quiet", [quiet_libraries, quiet_imports])
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_what_a_library_is_about_to_remove_fails_the_tests(quiet, category, monkeypatch):
    with pytest.raises(category, match="no_such_option"), quiet():
        warnings.warn("no_such_option is deprecated", category, stacklevel=1)
    with quiet():
        warnings.warn("of no interest here", stacklevel=1)
    monkeypatch.delenv(DEPRECATIONS)
    with quiet():
        warnings.warn("no_such_option is deprecated", category, stacklevel=1)
