"""What the imports of the libraries change and change back, what they leave out, and what they let be heard."""

import json
import os
import subprocess
import sys
import warnings

from utils.runtime.libraries import DEPRECATIONS, quiet_imports, quiet_libraries

import pytest
import torch

from tests.helpers.script import ROOT, TRAIN, as_argv, run_python
from utils.runtime import libraries

# One process that answers for evaluation first, which must do without ColossalAI, and then for training.
QUESTIONS = """
import sys
sys.path[:0] = sys.argv[1:]
import importlib.metadata, json
before = importlib.metadata.packages_distributions
import utils.evaluation.generate, utils.evaluation.score
answers = dict(evaluation=[name for name in sys.modules if name.partition(".")[0] == "colossalai"])
import utils.runtime.colossal
answers["training"] = "colossalai" in sys.modules
answers["as it was"] = before == importlib.metadata.packages_distributions
answers["absent"] = [name for name, module in sys.modules.items() if module is None and "." not in name]
answers["modules"] = list(sys.modules)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """In a folder with folders named like parts of scipy, for which the libraries look: once that was a KeyError."""
    folder = tmp_path_factory.mktemp("scipy")
    for name in ("stats", "integrate"):
        (folder / name).mkdir()
    result = run_python(QUESTIONS, folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_imports_leave_nothing_behind(answers):
    assert answers["as it was"] and answers["absent"] == []
    assert not [name for name in answers["modules"] if name.startswith("galore_torch")]


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="older libraries import more")
def test_what_nothing_uses_is_not_imported(answers):
    unused = {"peft", "bitsandbytes", "sklearn", "pandas", "torchvision"}
    assert unused.isdisjoint(answers["modules"])


def test_evaluation_does_without_colossalai(answers):
    assert answers["evaluation"] == [] and answers["training"]


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


BROKEN = {
    "bitsandbytes": 'raise RuntimeError("CUDA Setup failed\\nmany more lines")',
    "peft": 'raise ModuleNotFoundError("No module named \'peft\'", name="peft")',
    "galore_torch": "import no_such_module",
    "xformers": 'raise ImportError("undefined symbol")',
    "sklearn": 'raise ImportError("numpy.core.multiarray failed to import")',
    "torchvision": 'raise RuntimeError("operator torchvision::nms does not exist")',
}


@pytest.fixture
def broken_packages(tmp_path) -> dict[str, str]:
    """An environment in which all of these packages fail to import."""
    for name, source in BROKEN.items():
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(source)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "broken"), "OMP_NUM_THREADS": "1"}


def test_training_goes_on_without_them(broken_packages, flags, output):
    command = [sys.executable, TRAIN, *as_argv(flags | dict(max_train_steps=1))]
    result = subprocess.run(command, cwd=ROOT, env=broken_packages, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (output / "model_index.json").is_file()
    assert not set(BROKEN) & set(result.stderr.split()) and "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_package_that_diffusers_has_found_before_is_not_hidden_from_it(tmp_path):
    """diffusers looks for it when it is imported, and imports it later."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text("")
    (tmp_path / "bitsandbytes-0.45.0.dist-info").mkdir()
    (tmp_path / "bitsandbytes-0.45.0.dist-info/METADATA").write_text("Name: bitsandbytes\nVersion: 0.45.0\n")
    code = "import diffusers.utils as u; assert u.is_bitsandbytes_available(); import utils.runtime.libraries"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:]


def test_what_has_been_imported_is_no_stand_in(monkeypatch):
    monkeypatch.setattr(libraries, "IMPORTED_BY_COLOSSALAI", ("json", "json.part"))
    with libraries.stand_ins():
        assert sys.modules["json"] is json and "json.part" not in sys.modules


def test_torchs_threads_sleep_soon_unless_the_user_says_otherwise():
    """libgomp itself says what it has read."""
    without = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for libraries_, given, expected in (
        ("utils, torch", {}, "4000"),
        ("utils", dict(GOMP_SPINCOUNT="7"), "7"),
        ("utils", dict(OMP_WAIT_POLICY="ACTIVE"), "None"),
    ):
        code = f"import os, {libraries_}; print(os.environ.get('GOMP_SPINCOUNT'))"
        environment = without | given | dict(OMP_DISPLAY_ENV="verbose")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
        assert "torch" not in libraries_ or "GOMP_SPINCOUNT = '4000'" in done.stderr
