"""The notebook runs from top to bottom, and shows the comparison and the report; so do the forge's files parse."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.script import ROOT

NOTEBOOK = ROOT / "notebooks/dreambooth.ipynb"


def test_the_notebook_holds_no_results():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
    for cell in cells:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    settings = dict(OUTPUT_DIR=tmp_path / "output", RESULT_DIR=tmp_path / "result", INSTANCE_DIR=ROOT / "instance")
    settings |= dict(VENV=sys.prefix, MODEL_NAME=ROOT / "model/tiny-stable-diffusion", MAX_TRAIN_STEPS=2)
    settings |= dict(NUM_IMAGES=1, NUM_DRIFT_IMAGES=0, NUM_INFERENCE_STEPS=2, OMP_NUM_THREADS=1)
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = dict(metadata=dict(path=str(NOTEBOOK.parent)))
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in data for data in shown)
    assert any("<iframe srcdoc=" in "".join(data.get("text/html", "")) for data in shown)
    assert os.listdir(tmp_path / "output")


@pytest.mark.parametrize(
    "name", [".github/workflows/test.yml", ".pre-commit-config.yaml", *(ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")]
)
def test_the_forges_files(name):
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    if Path(name).parent.name == "ISSUE_TEMPLATE":
        assert "python -m utils.doctor" in json.dumps(content)
    if Path(name).name == "test.yml":
        (job,) = content["jobs"].values()
        assert len(job["strategy"]["matrix"]["python"]) == 2 and job["steps"][-1] == dict(run="bash test.sh")


def test_before_a_commit_what_test_sh_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    checked = [line for line in (ROOT / "test.sh").read_text().splitlines() if line.startswith(".venv/bin/")]
    assert [hook["entry"] for hook in hooks] == [line.removesuffix(" .") for line in checked]
