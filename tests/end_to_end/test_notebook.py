"""The notebook runs from top to bottom, and shows the comparison and the report; so do the forge's files parse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


class NoProcess:
    """In place of subprocess.Popen: keeps each environment, runs nothing."""

    environments: list[dict] = []
    stdout, returncode = (), 0

    def __init__(self, command, env, **options):
        self.environments.append(env)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_settings_that_are_edited_count_when_the_cells_run_again(tmp_path, monkeypatch):
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]}
    monkeypatch.chdir(NOTEBOOK.parent)
    for name in ("INSTANCE_DIR", "INSTANCE_PROMPT", "MAX_TRAIN_STEPS", "OUTPUT_DIR", "RESULT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VENV", sys.prefix)
    monkeypatch.setenv("MODEL_NAME", "outside")
    monkeypatch.setattr(subprocess, "Popen", NoProcess)
    monkeypatch.setattr(NoProcess, "environments", [])
    shown = SimpleNamespace(HTML=str, Image=lambda filename: filename, display=print)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    before, names = dict(os.environ), {}
    for photos, settings in (("instance", dict(MODEL_NAME="inside")), (str(tmp_path), dict(MAX_TRAIN_STEPS="3"))):
        folders = dict(OUTPUT_DIR=f"output-{Path(photos).name}", RESULT_DIR=f"result-{Path(photos).name}")
        prompt = f"a photo in {photos}"
        again = cells | {
            "cell-4": re.sub("PHOTOS = .*", f"PHOTOS = {photos!r}", cells["cell-4"], count=1),
            "cell-6": re.sub("INSTANCE_PROMPT=.*", f"INSTANCE_PROMPT={prompt!r}, **{settings},", cells["cell-6"]),
        }
        for cell in ("cell-2", "cell-4", "cell-6", "cell-8"):
            exec(again[cell], names)
        assert NoProcess.environments[-1] == before | settings | folders | dict(
            INSTANCE_DIR=photos, INSTANCE_PROMPT=prompt, MODEL_NAME="outside"
        )
        assert names["result"] == Path(folders["RESULT_DIR"])
        assert dict(os.environ) == before


def test_a_restart_and_another_upload(tmp_path, monkeypatch, capsys):
    """What was cloned is used, and what was uploaded before is not among the photos."""
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]}
    (tmp_path / "dreambooth").mkdir()
    (tmp_path / "dreambooth/run.sh").touch()
    monkeypatch.setenv("VENV", sys.prefix)
    monkeypatch.setenv("INSTANCE_DIR", "upload")
    for upload, folder in (("dog.jpg", "photos"), ("cat.jpg", "photos-2"), ("fox.jpg", "photos-3")):
        monkeypatch.chdir(tmp_path)
        colab = SimpleNamespace(files=SimpleNamespace(upload=lambda name=upload: {name: b""}))
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        names: dict = {}
        exec(cells["cell-2"], names), exec(cells["cell-4"], names)
        assert Path.cwd() == tmp_path / "dreambooth" and names["PHOTOS"] == folder
        assert os.listdir(folder) == [upload]
        assert ("left where it is" in capsys.readouterr().out) == (folder != "photos")


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


def read_yaml(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_forges_files():
    (job,) = read_yaml(".github/workflows/test.yml")["jobs"].values()
    assert len(job["strategy"]["matrix"]["python"]) == 2 and job["steps"][-1] == dict(run="bash test.sh")
    templates = list((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert templates and all("python -m utils.doctor" in json.dumps(read_yaml(path)) for path in templates)


def test_before_a_commit_what_test_sh_checks():
    hooks = read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]
    checked = [line for line in (ROOT / "test.sh").read_text().splitlines() if line.startswith(".venv/bin/")]
    assert [hook["entry"] for hook in hooks] == [line.removesuffix(" .") for line in checked]
