"""The model card of what was evaluated, and of nothing else, has the scores."""

import json
import shutil
from pathlib import Path

import evaluate
from tests.helpers.pipelines import edit_json
from tests.helpers.results import write_result
from utils import PROGRAM
from utils.command_line import run_main


def as_trained(folder: Path, base: Path) -> Path:
    """Makes a pipeline that training wrote of the folder that a result was made with."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    edit_json(folder / "run.json", program=PROGRAM)
    return folder


def test_the_card_is_that_of_the_model_that_drew(tmp_path, photos_dir, tiny_pipeline_dir, monkeypatch):
    result = write_result(tmp_path / "elsewhere", photos_dir, prompt="a cat")
    evaluated = as_trained(tmp_path / "elsewhere/output", tiny_pipeline_dir)
    default = shutil.copytree(evaluated, tmp_path / "output")
    subject = [dict(instance_prompt="a photo of sks cat", instance_data_dir=str(photos_dir))]
    (tmp_path / "list.json").write_text(json.dumps(subject))
    edit_json(default / "run.json", arguments=dict(concepts_list=str(tmp_path / "list.json")))
    monkeypatch.chdir(tmp_path)
    assert run_main(evaluate.main, ["--only", "report", "--output_dir", str(result)]) == 0
    card = (evaluated / "README.md").read_text()
    assert "| DINO |" in card and "By CLIP and CLIP." in card and not (default / "README.md").exists()
