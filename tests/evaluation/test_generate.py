"""evaluate.py end to end, in-process: what it writes, what it refuses, and what it says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers import evaluating
from tests.helpers.evaluating import write_trained
from tests.helpers.script import UNET_FILE
from utils.evaluation.comparison import Row, make_comparison, plan
from utils.evaluation.prompts import PLACES, other_prompts
from utils.files import png
from utils.models import drawing, loading
from utils.models.folder import read_base
from utils.runtime import gpu

PROMPT = "a photo of my cat."
PICTURES = [f"{stem}-{number}.png" for stem in ("baseline", "output") for number in (1, 2)] + ["comparison.png"]
OTHER_FILES = ["samples.json", "metrics.json", "report.html", "embeddings.npz"]
OTHERS = other_prompts("cat")


@pytest.fixture(scope="module")
def trained_dir(tiny_pipeline_dir, photos_dir, tmp_path_factory) -> Path:
    """Never write into it."""
    return write_trained(tmp_path_factory.mktemp("run") / "output", tiny_pipeline_dir, photos_dir, PROMPT)


@pytest.fixture
def finetuned_dir(trained_dir, tmp_path) -> Path:
    """A copy of trained_dir to break."""
    return shutil.copytree(trained_dir, tmp_path / "output")


@pytest.fixture
def result(tmp_path) -> Path:
    return tmp_path / "result"


def run(finetuned: Path, result: Path, *more: str) -> int:
    return evaluating.run(finetuned, result, "--num_drift_images=0", "--num_inference_steps=2", *more)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), int)


def refuse_to_load(*_args, **_kwargs):
    raise AssertionError("a model was loaded before the mistake was found")


def assert_refused(capsys, monkeypatch, finetuned: Path, result: Path, *more: str) -> str:
    """Runs with a mistake: one line on stderr, exit code 2, no model loaded, nothing written. Returns the line."""
    monkeypatch.setattr(loading, "load_pipeline", refuse_to_load)
    root = result.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert run(finetuned, result, *more) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    return stderr


# What it writes


@pytest.fixture(scope="module")
def first_result(trained_dir, tmp_path_factory) -> Path:
    """With what the flags are by default, num_drift_images among them."""
    folder = tmp_path_factory.mktemp("evaluate") / "result"
    assert evaluating.run(trained_dir, folder, "--num_inference_steps=2") == 0
    return folder


def test_the_recipes_files_are_written(first_result):
    assert sorted(path.name for path in first_result.iterdir()) == sorted([*PICTURES, *OTHER_FILES, "images"])
    assert pixels(first_result / "output-1.png").shape == (32, 32, 3)


def test_both_rows_have_the_same_seeds_and_each_its_own_model(first_result, trained_dir, tiny_pipeline_dir):
    for stem, folder in (("baseline", tiny_pipeline_dir), ("output", trained_dir)):
        pipeline = loading.load_pipeline(read_base(folder), torch.float32, torch.device("cpu"))
        expected = drawing.sample(pipeline, PROMPT, [0, 1], num_inference_steps=2)
        for number, image in enumerate(expected, start=1):
            written = pixels(first_result / f"{stem}-{number}.png")
            assert np.abs(written - np.asarray(image, int)).max() <= 1
    assert np.abs(pixels(first_result / "baseline-1.png") - pixels(first_result / "output-1.png")).max() > 1


def test_samples_json_records_all_that_makes_the_images(first_result, trained_dir, tiny_pipeline_dir):
    samples = json.loads((first_result / "samples.json").read_text())
    expected = dict(written_by="evaluate.py", complete=True, num_inference_steps=2, guidance_scale=7.5)
    expected |= dict(height=32, width=32, negative_prompt=None, batch_size=None, safety_checker=False)
    expected |= dict(identifier="my", class_name="cat", num_images=2, num_drift_images=1)
    assert {name: samples[name] for name in expected} == expected
    assert [prompt["text"] for prompt in samples["prompts"]] == [
        PROMPT,
        *(f"a photo of my cat {place}" for place in PLACES),
        "a photo of a cat",
        *OTHERS,
    ]
    roles = ["subject", *4 * ["place"], "class", *8 * ["other"]]
    assert [prompt["role"] for prompt in samples["prompts"]] == roles
    subject = [entry for entry in samples["images"] if entry["role"] == "subject"]
    assert [(entry["file"], entry["model"], entry["seed"]) for entry in subject] == [
        ("baseline-1.png", "baseline", 0),
        ("baseline-2.png", "baseline", 1),
        ("output-1.png", "finetuned", 0),
        ("output-2.png", "finetuned", 1),
    ]
    assert len(samples["images"]) == 2 * (2 + 4 + 2 + 8)
    assert samples["images"][7]["file"] == "images/baseline/a-photo-of-a-cat/seed-1.png"
    assert sorted(samples["files"]) == sorted([*(entry["file"] for entry in samples["images"]), "comparison.png"])
    baseline = samples["models"]["baseline"]
    assert (baseline["path"], baseline["scheduler"]) == (str(tiny_pipeline_dir), "PNDMScheduler")
    assert baseline["sha256"]["vae"] == samples["models"]["finetuned"]["sha256"]["vae"]
    assert baseline["sha256"]["unet"] != samples["models"]["finetuned"]["sha256"]["unet"]
    assert samples["models"]["finetuned"]["path"] == str(trained_dir)
    assert samples["versions"]["torch"] == torch.__version__


def test_each_image_carries_its_settings(first_result, tiny_pipeline_dir):
    with Image.open(first_result / "baseline-2.png") as image:
        digest = image.text.pop("settings_sha256")
        assert len(digest) == 64
        assert image.text == dict(
            prompt=PROMPT, num_inference_steps="2", guidance_scale="7.5", seed="1", model=str(tiny_pipeline_dir)
        )


def test_the_sheet_holds_photos_and_both_models_images_also_in_places(
    first_result, photos_dir, trained_dir, tiny_pipeline_dir
):
    photos = [Image.open(photos_dir / f"photo-{number}.jpg") for number in (0, 1)]
    rows = [Row("your photos", "2 of 4", photos, ["photo 1", "photo 2"])]  # no names of files: it is shared
    entries = json.loads((first_result / "samples.json").read_text())["images"]
    for role, captions in (("subject", ["seed 0", "seed 1"]), ("place", PLACES)):
        for label, model, folder in (
            ("the base", "baseline", tiny_pipeline_dir),
            ("the result", "finetuned", trained_dir),
        ):
            files = [entry["file"] for entry in entries if (entry["role"], entry["model"]) == (role, model)]
            images = [Image.open(first_result / file) for file in files]
            rows.append(Row(label, folder.name, images, captions if model == "baseline" else ()))
    expected = make_comparison(PROMPT, "2 steps, guidance 7.5, 32 x 32 pixels", rows)
    assert np.array_equal(pixels(first_result / "comparison.png"), np.asarray(expected))


def test_it_says_what_it_took_from_run_json_and_where_to_look(trained_dir, result, capsys):
    assert run(trained_dir, result) == 0
    stdout = capsys.readouterr().out
    (taken,) = [line for line in stdout.splitlines() if line.startswith(f"from {trained_dir / 'run.json'}: --pretr")]
    assert " --prompt " in taken and " --instance_data_dir " in taken
    assert "images per second" in stdout
    look = f"Look at {result / 'comparison.png'}\nLook at {result / 'report.html'}\n"
    assert stdout.partition(look)[2].startswith("None of 2 pictures of your subject")


def test_flags_win_over_run_json(trained_dir, result, tiny_pipeline_dir):
    folder = shutil.copytree(tiny_pipeline_dir, result.parent / "other")
    more = ["--prompt", "a dog", "--pretrained_model_name_or_path", str(folder), "--seed", "5", "--height", "40"]
    assert run(trained_dir, result, *more, "--width", "64", "--batch_size", "1", "--negative_prompt", "x") == 0
    samples = json.loads((result / "samples.json").read_text())
    assert (samples["prompts"][0]["text"], samples["models"]["baseline"]["path"]) == ("a dog", str(folder))
    assert [entry["seed"] for entry in samples["images"] if entry["role"] == "subject"] == [5, 6, 5, 6]
    assert pixels(result / "output-1.png").shape == (40, 64, 3)


def test_a_folder_without_run_json_needs_the_flags_and_no_photos(finetuned_dir, result, tiny_pipeline_dir):
    (finetuned_dir / "run.json").unlink()
    more = ["--prompt", PROMPT, "--pretrained_model_name_or_path", str(tiny_pipeline_dir)]
    assert run(finetuned_dir, result, *more) == 0
    assert (
        Image.open(result / "comparison.png").height
        == plan([Row("", "", [None, None], ["x"]), Row("", "", [None, None])]).size[1]
    )


# Running it again


def test_a_second_run_replaces_its_own_files_and_keeps_the_others(trained_dir, result):
    result.mkdir()
    (result / "notes.txt").write_text("mine")
    (result / "output-3.png").write_text("foreign, and in nobody's way")
    with_drift = ["--num_drift_images", "1"]
    assert run(trained_dir, result, *with_drift) == 0
    first = pixels(result / "output-1.png")
    assert run(trained_dir, result, *with_drift, "--num_images", "1", "--seed", "9") == 0
    assert not np.array_equal(first, pixels(result / "output-1.png"))
    kept = ["notes.txt", "output-3.png"]
    written = ["baseline-1.png", "comparison.png", "output-1.png", "images", *OTHER_FILES]
    assert sorted(path.name for path in result.iterdir()) == sorted(kept + written)
    assert (result / "output-3.png").read_text() == "foreign, and in nobody's way"


@pytest.mark.parametrize("name", ["output-2.png", "baseline-1.png", "comparison.png", *OTHER_FILES])
def test_a_foreign_file_is_not_overwritten(capsys, monkeypatch, trained_dir, result, name):
    result.mkdir()
    (result / name).write_text('{"mine": true}')
    assert str(result / name) in assert_refused(capsys, monkeypatch, trained_dir, result)


def test_a_file_that_samples_json_does_not_list_is_foreign(capsys, monkeypatch, first_result, trained_dir, result):
    shutil.copytree(first_result, result)
    (result / "output-3.png").write_text("mine")
    more = ["--num_images", "3"]
    assert str(result / "output-3.png") in assert_refused(capsys, monkeypatch, trained_dir, result, *more)


def test_samples_json_cannot_name_files_elsewhere(trained_dir, result):
    result.mkdir()
    outside, inside = result.parent / "output-7.png", result / "notes.txt"
    outside.write_text("mine")
    inside.write_text("mine")
    files = ["../output-7.png", str(outside), "notes.txt", 3]
    (result / "samples.json").write_text(json.dumps(dict(written_by="evaluate.py", files=files)))
    assert run(trained_dir, result) == 0
    assert outside.read_text() == inside.read_text() == "mine"


def test_a_page_is_of_the_photos_that_its_model_was_trained_on(capsys, finetuned_dir, result):
    """A second subject in the first one's folders costs nobody the first page; a model that has moved is the same."""
    run_json, quick = finetuned_dir / "run.json", ["--only", "generate", "--num_images", "1"]
    kept = json.loads(run_json.read_text()) | dict(photos=[dict(sha256="a"), dict(sha256="b", prompt=PROMPT)])
    run_json.write_text(json.dumps(kept))
    assert run(finetuned_dir, result, *quick) == 0
    moved = finetuned_dir.rename(result.parent / "moved")
    assert run(moved, result, *quick, "--prompt", PROMPT, "--prompt", "a cat") == 0
    for changed in (
        dict(photos=kept["photos"][:1]),
        dict(arguments=kept["arguments"] | dict(instance_prompt="a dog")),
    ):
        (moved / "run.json").write_text(json.dumps(kept | changed))
        assert run(moved, result, *quick) == 2
        assert "another model (of other photos or prompts)" in capsys.readouterr().err
    assert run(moved, result, *quick, "--overwrite_output_dir") == 0


def test_a_run_cut_off_while_writing_can_be_repeated(trained_dir, result, monkeypatch, capsys):
    save_png = png.save_png

    def fail_at_output(path, image, texts):
        if path.name == "output-1.png":
            raise OSError(28, "No space left on device")
        save_png(path, image, texts)

    monkeypatch.setattr(png, "save_png", fail_at_output)
    assert run(trained_dir, result) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads((result / "samples.json").read_text())["complete"] is False
    monkeypatch.undo()
    assert run(trained_dir, result) == 0
    assert json.loads((result / "samples.json").read_text())["complete"] is True


# What it refuses


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_images", "0"], "--num_images"),
        (["--num_inference_steps", "0"], "--num_inference_steps"),
        (["--num_inference_steps", "1001"], "1000 timesteps at most"),
        (["--batch_size", "0"], "--batch_size"),
        (["--guidance_scale", "nan"], "--guidance_scale"),
        (["--guidance_scale", "-1"], "--guidance_scale"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "x"], "--seed"),
        (["--height", "33"], "--height is 33: give a multiple of 8, such as 32"),
        (["--width", "3"], "--width is 3: give a multiple of 8, such as 8"),
        (["--mixed_precision", "fp8"], "--mixed_precision"),
        (["--num_image", "4"], "--num_image"),
        (["--prompt", "\udcff"], "argument --prompt: holds characters"),
        (["--prompt", "a cat", "--prompt", ""], "argument --prompt: is empty"),
        (["--drift_prompt", " "], "argument --drift_prompt: is empty"),
        (["--pretrained_model_name_or_path", ""], "--pretrained_model_name_or_path: is empty"),
        (
            ["--pretrained_model_name_or_path", "CompVis/stable-diffusion-v1-4"],
            "hf download CompVis/stable-diffusion-v1-4",
        ),
        (["--pretrained_model_name_or_path", "/no/such/model/folder"], "/no/such/model/folder does not exist"),
        (["--finetuned_model_name_or_path", "./missing"], "train first (run.sh)"),
        (["--instance_data_dir", "missing/photos"], "--instance_data_dir missing/photos does not exist"),
        (["--safety_checker"], "leave the flag out"),
    ],
)
def test_a_mistaken_flag_is_named(capsys, monkeypatch, trained_dir, result, more, message):
    assert message in assert_refused(capsys, monkeypatch, trained_dir, result, *more)


def make_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438167540\n")


BREAKAGES = {
    "unfinished": (lambda f: (f / "model_index.json").unlink(), "unfinished training output"),
    "empty merges": (lambda f: (f / "tokenizer/merges.txt").write_text(""), "merges.txt is empty"),
    "git-lfs pointer": (lambda f: make_lfs_pointer(f / UNET_FILE), "git lfs pull"),
    "damaged run.json": (lambda f: (f / "run.json").write_text("[]"), "run.json"),
    "moved baseline": (
        lambda f: (f / "run.json").write_text('{"arguments": {"pretrained_model_name_or_path": "gone/away"}}'),
        "is not at gone/away",
    ),
    "nothing recorded": (lambda f: (f / "run.json").unlink(), "--pretrained_model_name_or_path is missing"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_an_unfit_model_folder_is_named(capsys, monkeypatch, finetuned_dir, result, name):
    break_it, message = BREAKAGES[name]
    break_it(finetuned_dir)
    stderr = assert_refused(capsys, monkeypatch, finetuned_dir, result)
    assert message in stderr and str(finetuned_dir) in stderr


def test_a_lone_unet_and_an_empty_folder_are_told_apart(capsys, monkeypatch, finetuned_dir, result):
    assert "looks like one model" in assert_refused(capsys, monkeypatch, finetuned_dir / "unet", result)
    (finetuned_dir / "empty").mkdir()
    assert "it is empty" in assert_refused(capsys, monkeypatch, finetuned_dir / "empty", result)


def test_the_baseline_is_checked_too(capsys, monkeypatch, trained_dir, tiny_pipeline_dir, result):
    folder = shutil.copytree(tiny_pipeline_dir, result.parent / "base")
    make_lfs_pointer(folder / "text_encoder/model.safetensors")
    more = ["--pretrained_model_name_or_path", str(folder)]
    assert str(folder / "text_encoder") in assert_refused(capsys, monkeypatch, trained_dir, result, *more)


def test_results_do_not_go_into_a_model_or_photo_folder(capsys, monkeypatch, finetuned_dir, result):
    photos = result.parent / "photos"
    photos.mkdir()
    more = ["--instance_data_dir", str(photos)]
    for folder in (finetuned_dir, finetuned_dir / "result", photos):
        stderr = assert_refused(capsys, monkeypatch, finetuned_dir, result, *more, "--output_dir", str(folder))
        assert "name a folder of its own" in stderr


def test_a_file_is_no_output_folder(capsys, monkeypatch, trained_dir, result):
    result.write_text("a file")
    for folder in (result, result / "below"):
        stderr = assert_refused(capsys, monkeypatch, trained_dir, result, "--output_dir", str(folder))
        assert f"--output_dir {folder}: {result} is a file, so no folder can be made in it" in stderr


# What it warns of


def warnings_of(capsys, *args) -> str:
    assert run(*args) == 0
    return "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))


def test_equal_models_are_warned_of(capsys, trained_dir, tiny_pipeline_dir, finetuned_dir, result):
    more = ["--pretrained_model_name_or_path", str(trained_dir)]
    for folder, other in ((trained_dir, result), (finetuned_dir, result.parent / "other")):
        assert warnings_of(capsys, folder, other, *more).count("both rows will be the same") == 1


def test_fp16_on_a_cpu_and_a_gpu_that_cannot_be_used_are_warned_of(capsys, monkeypatch, trained_dir, result):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problem = gpu.Finding("problem", "the driver is too old", "update it")
    monkeypatch.setattr(gpu, "examine_gpu", lambda: [problem])
    said = warnings_of(capsys, trained_dir, result, "--mixed_precision", "fp16")
    assert "many times slower" in said and "warning: the driver is too old: update it\n" in said
    assert json.loads((result / "samples.json").read_text())["mixed_precision"] == "fp16"


def test_images_of_one_colour_are_warned_of(capsys, finetuned_dir, result):
    path = finetuned_dir / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.weight"] *= 0
    save_file(weights, path, {"format": "pt"})
    stderr = warnings_of(capsys, finetuned_dir, result)
    assert "output-1.png, output-2.png" in stderr and "try an earlier checkpoint" in stderr
    assert "baseline-1.png" not in stderr


def test_photos_that_are_gone_or_none_are_warned_of(capsys, finetuned_dir, photos_dir, result):
    run_json = finetuned_dir / "run.json"
    run_json.write_text(run_json.read_text().replace(str(photos_dir), "gone/photos"))
    assert "gone/photos" in warnings_of(capsys, finetuned_dir, result)
    (result.parent / "empty").mkdir()
    more = ["--instance_data_dir", str(result.parent / "empty")]
    assert "holds no photo" in warnings_of(capsys, finetuned_dir, result, *more)


def test_a_prompt_beyond_the_text_encoder_and_a_run_in_progress_are_warned_of(capsys, finetuned_dir, result):
    run_json = finetuned_dir / "run.json"
    run_json.write_text(json.dumps(json.loads(run_json.read_text()) | dict(status="running")))
    stderr = warnings_of(capsys, finetuned_dir, result, "--prompt", "a " * 75 + "zebra")
    assert "does not see its end" in stderr and "holds an earlier result" in stderr


def test_a_negative_prompt_is_cut_with_a_warning_and_is_not_named_without_guidance(trained_dir, result, capsys):
    more = ["--only", "generate", "--num_images", "1", "--negative_prompt", "cat " * 80 + "at its end"]
    assert run(trained_dir, result, *more) == 0
    assert 'does not see its end: "' in (err := capsys.readouterr().err) and err.count("at its end") == 1
    assert run(trained_dir, result, *more, "--guidance_scale", "1") == 0
    out, err = capsys.readouterr()
    assert "does not see" not in err and "--guidance_scale 1: --negative_prompt has no effect" in out
    assert json.loads((result / "samples.json").read_text())["negative_prompt"] is None


def test_an_error_is_of_the_file_that_it_is_about(trained_dir, result, capsys, monkeypatch):
    for name, advice in ((str(result / "a.png"), True), (None, True), ("/elsewhere/a.png", False)):
        error = OSError(28, "No space left on device", name)
        monkeypatch.setattr(png, "save_png", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert run(trained_dir, result, "--only", "generate") == 2
        said = f"error: {name or result}: No space left on device{'; make room there' if advice else chr(10)}"
        assert said in capsys.readouterr().err
