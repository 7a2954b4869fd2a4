"""--choose: which models are compared, what is said of them, and the command that writes the chosen one."""

import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import evaluate
from tests.helpers.encoders import write_clip
from tests.helpers.evaluating import read, run, write_trained
from tests.helpers.script import UNET_FILE
from utils.command_line import run_main
from utils.evaluation import candidates
from utils.evaluation.candidates import candidate_models, export_command
from utils.export import main as export
from utils.models import drawing
from utils.runtime.process import typed

QUICK = "DPMSolverMultistepScheduler"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_pipeline_dir, photos_dir) -> Path:
    """With checkpoints 5, 10 and 15; the last is the result. Never write into it."""
    folder, prompt = tmp_path_factory.mktemp("run") / "output", "a photo of sks cat"
    return write_trained(folder, tiny_pipeline_dir, photos_dir, prompt, (5, 10, 15))


def names(checkpoints: list[str], last: int | None) -> list[str]:
    return [model.name for model in candidate_models(checkpoints, last)]


def test_a_few_checkpoints_evenly_and_the_result_at_three_strengths():
    result = ["baseline", "finetuned", "finetuned@0.5", "finetuned@0.75"]
    assert names([], 20) == result
    assert names(["checkpoint-5", "checkpoint-10", "checkpoint-15"], 15) == [*result, "checkpoint-5", "checkpoint-10"]
    many = [f"checkpoint-{step}" for step in range(100, 1000, 100)]
    assert names(many, None) == [*result, "checkpoint-200", "checkpoint-500", "checkpoint-800"]


def test_the_choice_is_in_metrics_json_and_its_sentence_on_the_terminal(trained, tmp_path, capsys):
    result = tmp_path / "result"
    clip = ["--clip_model", str(write_clip(tmp_path / "clip"))]
    assert run(trained, result, "--choose", *clip) == 0
    said, metrics = " ".join(capsys.readouterr().out.split()), read(result, "metrics.json")
    assert list(metrics["models"]) == ["baseline", "finetuned"]
    found, samples = metrics["choice"], read(result, "samples.json")
    assert (found["answer"], found["chosen"], found["command"]) == (
        "look",
        None,
        None,
    )  # random weights know no photos
    assert metrics["scorer"]["line"] != "" == found["why"]  # which is said once
    assert found["sentence"] in said and said.count("does not know such photos") == 1
    expected = ["checkpoint-5", "finetuned@0.5", "checkpoint-10", "finetuned@0.75", "finetuned"]  # nearest first
    assert [entry["name"] for entry in found["entries"]] == expected
    assert [entry["command"] is None for entry in found["entries"]] == [False] * 4 + [True]
    for entry in found["entries"]:
        own = [image for image in samples["candidates"]["images"] if image["model"] == entry["name"]]
        assert [image["seed"] for image in own] == [
            *range(2, 2 + 6),
            *range(2, 8000, 1000),
        ]  # others than the final ones
        assert entry["copies"] == [] and entry["note"] == ""
    assert {model["scheduler"] for model in samples["models"].values()} == {"PNDMScheduler"}
    assert {model["scheduler"] for model in samples["candidates"]["models"].values()} == {QUICK}

    before = {path: path.stat().st_mtime_ns for path in result.rglob("*.png") if path.name != "comparison.png"}
    assert run(trained, result, "--choose", *clip) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    (result / samples["candidates"]["images"][0]["file"]).unlink()
    assert run_main(evaluate.main, ["--only", "score", "--output_dir", str(result)]) == 2
    assert "is missing" in capsys.readouterr().err
    assert run(trained, result, *clip) == 0
    assert not (result / "candidates").exists() and read(result, "metrics.json")["choice"] is None


def test_candidates_are_drawn_by_the_quick_solver_and_final_images_by_the_models_own(trained, tmp_path, monkeypatch):
    drawn, real = [], drawing.sample

    def note(pipeline, prompts, seeds, **options):
        scheduler, steps = type(pipeline.scheduler).__name__, options["num_inference_steps"]
        drawn.append((scheduler, steps, len(set(prompts)), len(seeds)))
        return real(pipeline, prompts, seeds, **options | dict(num_inference_steps=1))

    monkeypatch.setattr(drawing, "sample", note)
    assert run(trained, tmp_path / "result", "--choose", "--num_inference_steps", "30", "--only", "generate") == 0
    of_model = [("PNDMScheduler", 30, *group) for group in ((1, 2), (4, 4), (1, 2), (8, 8))]  # prompts, images
    assert drawn[:8] == 2 * of_model
    of_candidate = [(QUICK, candidates.NUM_INFERENCE_STEPS, *group) for group in ((1, 6), (8, 8))]
    assert drawn[8:] == 6 * of_candidate  # the baseline and five candidates


def test_the_command_writes_the_candidate(trained, tiny_pipeline_dir, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "out put")
    command = shlex.split(export_command(folder, tiny_pipeline_dir, "checkpoint-10@0.5"))
    assert command[:3] == [typed("python"), "-m", "utils.export"] and "--pretrained_model_name_or_path" not in command
    assert run_main(export, command[3:]) == 0
    base, tuned = (load_file(path / UNET_FILE) for path in (tiny_pipeline_dir, folder / "checkpoint-10"))
    written = load_file(tmp_path / "out put-chosen" / UNET_FILE)
    assert all((written[name] - (base[name] + tuned[name]) / 2).abs().max() < 1e-6 for name in written)
    assert export_command(folder, tiny_pipeline_dir, "finetuned") is None
    assert "--pretrained_model_name_or_path" in export_command(folder, tmp_path, "finetuned@0.5")
    assert "--strength" not in export_command(folder, tmp_path, "checkpoint-10")


@pytest.mark.parametrize("typed_as", [".", "checkpoint-5/..", "../output"])
def test_the_chosen_one_lies_beside_the_folder_however_that_is_typed(trained, tmp_path, monkeypatch, typed_as):
    folder = shutil.copytree(trained, tmp_path / "output")
    monkeypatch.chdir(folder)
    command = shlex.split(export_command(Path(typed_as), tmp_path, "checkpoint-10"))
    assert Path(command[command.index("utils.export") + 2]).resolve() == tmp_path / "output-chosen"
