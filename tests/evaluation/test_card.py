"""The model card of what was evaluated, and of nothing else, has the scores."""

import json
import shutil
from pathlib import Path

import evaluate
from tests.helpers.pipelines import edit_json
from tests.helpers.results import write_result
from utils import PROGRAM
from utils.command_line import run_main
from utils.evaluation.card import update_card


def as_trained(folder: Path, base: Path) -> Path:
    """Makes a pipeline that training wrote of the folder that a result was made with."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    edit_json(folder / "run.json", program=PROGRAM)
    return folder


def test_the_card_is_that_of_the_model_that_drew(tmp_path, photos_dir, tiny_pipeline_dir, monkeypatch, capsys):
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
    assert f"{evaluated / 'README.md'} has the scores" in capsys.readouterr().out


def test_of_several_subjects_the_card_has_the_means(tmp_path, photos_dir, tiny_pipeline_dir, capsys):
    result = write_result(tmp_path, photos_dir, prompt="a cat")
    card = as_trained(tmp_path / "output", tiny_pipeline_dir) / "README.md"
    cat, dog = (json.loads((result / "metrics.json").read_text()) for _ in range(2))
    dog["models"]["finetuned"]["dino"]["value"] = 0.9
    update_card(result, dict(cat=cat, dog=dog))
    assert "| DINO | 0.200 | 0.700 |" in card.read_text() and "![" not in card.read_text()
    assert "## Scores, means over 2 subjects" in card.read_text()
    assert f"{card} has the means of 2 subjects" in capsys.readouterr().out
    update_card(result, dict(cat=cat, dog=None))
    assert "| DINO |" not in card.read_text()
    assert f"{card} has no scores, since not all of 2 subjects have any" in capsys.readouterr().out
