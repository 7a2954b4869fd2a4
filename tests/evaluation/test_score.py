"""generate, score and report end to end: prompts, checkpoints, resumption, each stage by itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import evaluate
from tests.helpers.encoders import write_clip, write_dino, write_safety_checker
from tests.helpers.evaluating import read, run, scale_unet, write_state, write_trained
from tests.helpers.script import UNET_FILE
from utils.command_line import run_main
from utils.dataset import decode
from utils.evaluation import encoders, metrics
from utils.evaluation.arguments import parse_args
from utils.evaluation.plan import find_checkpoints, make_plan
from utils.evaluation.samples import plan_samples
from utils.evaluation.score import paper_columns
from utils.models import drawing, loading
from utils.models.folder import read_base

PROMPT = "a photo of sks cat"
IMAGES = 2 * 2 + 4 + 2 + 8  # of a model: two prompts, other places, the class, other things


@pytest.fixture(scope="module")
def trained_dir(tiny_pipeline_dir, photos_dir, tmp_path_factory) -> Path:
    """With two checkpoints. Never write into it."""
    return write_trained(tmp_path_factory.mktemp("run") / "output", tiny_pipeline_dir, photos_dir, PROMPT, (5, 10))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("encoders")
    clip, dino = write_clip(root / "clip"), write_dino(root / "dino")
    return ["--clip_model", str(clip), "--dino_model", str(dino)]


@pytest.fixture(scope="module")
def whole(trained_dir, models, tmp_path_factory) -> Path:
    """Two prompts, two checkpoints, all metrics."""
    folder = tmp_path_factory.mktemp("whole") / "result"
    more = ["--prompt", PROMPT, "--prompt", "a sks cat on the beach", "--checkpoint", "all", *models]
    assert run(trained_dir, folder, *more) == 0
    return folder


@pytest.fixture(scope="module")
def drawn_once(trained_dir, tmp_path_factory) -> Path:
    """The images of the prompt that was trained with, not scored. Never write into it."""
    folder = tmp_path_factory.mktemp("drawn") / "result"
    assert run(trained_dir, folder, "--only", "generate") == 0
    return folder


@pytest.fixture
def result(drawn_once, tmp_path) -> Path:
    """A copy of drawn_once to draw into."""
    return shutil.copytree(drawn_once, tmp_path / "result")


# generate


def test_several_prompts_have_a_folder_each_for_every_model(whole, trained_dir):
    samples = read(whole, "samples.json")
    assert list(samples["models"]) == ["baseline", "finetuned", "checkpoint-5", "checkpoint-10"]
    assert len(samples["images"]) == 4 * IMAGES
    assert (whole / "images/checkpoint-5/a-sks-cat-on-the-beach/seed-1001.png").is_file()
    assert (whole / "output-1.png").is_file() and (whole / "comparison.png").is_file()
    assert samples["models"]["checkpoint-5"]["path"] == str(trained_dir / "checkpoint-5" / "unet")


def test_texts_are_encoded_and_modules_loaded_once(trained_dir, tmp_path, monkeypatch):
    texts, loaded = [], []
    load_weights = loading._load_weights

    def noting(cls, *args, **options):
        loaded.append(cls.__name__)
        return load_weights(cls, *args, **options)

    monkeypatch.setattr(drawing.PromptEmbeddings, "__call__", spy(drawing.PromptEmbeddings.__call__, texts))
    monkeypatch.setattr(loading, "_load_weights", noting)
    more = "--checkpoint all --strength 0.5 1 --only generate --batch_size 1"
    assert run(trained_dir, tmp_path / "result", *more.split()) == 0
    assert sorted(loaded) == ["AutoencoderKL", "CLIPTextModel", *2 * ["UNet2DConditionModel"]]
    assert len(texts) == len(set(texts)) == 14


def test_each_strength_is_a_row_and_its_pictures_are_those_of_the_blended_pipeline(
    trained_dir, tiny_pipeline_dir, tmp_path
):
    result = tmp_path / "result"
    more = ["--num_drift_images", "0", "--checkpoint", "10"]
    assert run(trained_dir, result, *more, "--strength", "0.5", "1", "1.5") == 0
    names = ["baseline", "finetuned", "finetuned@0.5", "finetuned@1.5"]
    names += ["checkpoint-10@0.5", "checkpoint-10", "checkpoint-10@1.5"]
    assert list(read(result, "samples.json")["models"]) == list(read(result, "metrics.json")["models"]) == names
    assert read(result, "samples.json")["models"]["checkpoint-10@0.5"]["strength"] == 0.5

    folder = shutil.copytree(trained_dir, tmp_path / "output")
    for name, factor in (("checkpoint-10@0.5", 1.5), ("checkpoint-10", 2)):  # the result is 2.5 times the base
        scale_unet(tiny_pipeline_dir, folder, factor)
        pipeline = loading.load_pipeline(read_base(folder), torch.float32, torch.device("cpu"))
        expected = np.asarray(drawing.sample(pipeline, PROMPT, [1], num_inference_steps=1)[0], int)
        with Image.open(result / f"images/{name}/a-photo-of-sks-cat/seed-1.png") as image:
            assert np.abs(np.asarray(image, int) - expected).max() <= 1
    before = times(result)
    assert run(trained_dir, result, *more, "--strength", "0.5") == 0
    now = times(result)
    assert now == {path: before[path] for path in now}
    assert {path.parts[-3] for path in now if "images" in path.parts} == {"finetuned@0.5", "checkpoint-10@0.5"}


def spy(call, computed: list):
    def wrapped(self, pipeline, prompt):
        before = len(self._known)
        result = call(self, pipeline, prompt)
        computed.extend([prompt] * (len(self._known) - before))
        return result

    return wrapped


def times(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.png") if path.name != "comparison.png"}


def test_images_with_equal_settings_are_not_made_again(trained_dir, result, capsys, monkeypatch):
    before = times(result)
    monkeypatch.setattr(drawing, "sample", None)  # calling it fails
    assert run(trained_dir, result, "--only", "generate") == 0
    assert times(result) == before
    assert "32 of 32 images are there already" in capsys.readouterr().out
    monkeypatch.undo()

    (result / "output-2.png").unlink()
    Image.new("RGB", (32, 32)).save(result / "baseline-1.png")
    path = result / "images/finetuned/a-photo-of-a-dog/seed-0.png"
    path.write_bytes(path.read_bytes()[:-40])
    assert run(trained_dir, result, "--only", "generate") == 0
    changed = {path.name for path, time in times(result).items() if before.get(path) != time}
    assert changed == {"output-2.png", "baseline-1.png", "seed-0.png"}

    before = times(result)
    assert run(trained_dir, result, "--only", "generate", "--num_images", "3") == 0
    now = times(result)
    changed = {path.name for path in now if before.get(path) != now[path]}
    assert changed == {"output-3.png", "baseline-3.png", "seed-2.png"}  # the class has as many


def drawn(monkeypatch) -> list:
    """(prompt, seed) of each image that is drawn from now on."""
    images, sample = [], drawing.sample

    def noting(pipeline, prompts, seeds, **options):
        images.extend(zip(prompts, seeds, strict=True))
        return sample(pipeline, prompts, seeds, **options)

    monkeypatch.setattr(drawing, "sample", noting)
    return images


def contents(folder: Path) -> dict[str, bytes]:
    """{its name: the file} of every image."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in times(folder)}


def test_another_prompt_costs_its_own_images_alone(trained_dir, result, monkeypatch):
    other = ["--prompt", "sks cat in snow"]
    one, two = ["--only", "generate", "--prompt", PROMPT], ["--only", "generate", "--prompt", PROMPT, *other]
    first = contents(result)
    images = drawn(monkeypatch)
    assert run(trained_dir, result, *two) == 0
    assert images == 2 * [(other[1], 1000), (other[1], 1001)]
    second = contents(result)
    assert first.items() < second.items() and len(second) == len(first) + 4
    assert run(trained_dir, result, *one) == 0
    assert contents(result) == first and len(images) == 4


@pytest.mark.parametrize("more", [["--guidance_scale", "3"], ["--seed", "4"], ["--negative_prompt", "x"]])
def test_other_settings_make_other_images(trained_dir, result, more):
    before = times(result)
    assert run(trained_dir, result, "--only", "generate", "--num_drift_images", "0", *more) == 0
    now = times(result)
    assert len(now) == 4 and all(before[path] != now[path] for path in now)


def test_another_model_replaces_a_page_only_if_asked(trained_dir, tiny_pipeline_dir, result, tmp_path, capsys):
    folder = shutil.copytree(trained_dir, tmp_path / "output")
    before = times(result)
    scale_unet(tiny_pipeline_dir, folder, 1.1)
    assert run(folder, result) == 2
    assert f"the page of another model ({trained_dir}): give this one a folder of its own" in capsys.readouterr().err
    assert times(result) == before and not (result / "report.html").exists()
    assert run(folder, result, "--only", "generate", "--overwrite_output_dir") == 0
    now = times(result)
    assert {path.name for path in now if "baseline" in str(path) and before[path] != now[path]} == set()
    assert all(before[path] != now[path] for path in now if "finetuned" in str(path) or "output-" in path.name)


def test_images_of_a_prompt_no_longer_wanted_go(trained_dir, result):
    (result / "images" / "mine.txt").write_text("mine")
    assert run(trained_dir, result, "--only", "generate", "--num_drift_images", "0") == 0
    assert [path.name for path in (result / "images").iterdir()] == ["mine.txt"]


def test_the_papers_prompts_and_a_file_of_prompts(trained_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("a sks dog\na sks dog asleep\n")
    more = ["--dreambench", "live", "--identifier", "sks", "--class_name", "dog", "--num_images", "1"]
    more += ["--prompts_file", str(tmp_path / "prompts.txt"), "--num_drift_images", "0"]
    plan = make_plan(parse_args(["--finetuned_model_name_or_path", str(trained_dir), *more]))
    files = [sample.file for sample in plan_samples(plan)]
    assert len(files) == 2 * 27 and files[-1] == "images/finetuned/a-cube-shaped-sks-dog/seed-26000.png"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dreambench", "live"], "--dreambench needs --identifier"),
        (["--dreambench", "plants"], "--dreambench"),
        (["--checkpoint", "7"], "no whole checkpoint-7 (it holds: checkpoint-5, checkpoint-10)"),
        (["--checkpoint", "../x"], "--checkpoint ../x"),
        (["--prompts_file", "/no/such/file"], "--prompts_file /no/such/file"),
        (["--only", "draw"], "--only"),
        (["--clip_model", "/no/such/folder"], "--clip_model /no/such/folder does not exist"),
        (["--only", "score"], "does not read --finetuned_model_name_or_path (generate), --num_images (generate)"),
        (["--drift_prompt", "\udcff"], "--drift_prompt: holds characters"),
    ],
)
def test_a_mistake_is_named(trained_dir, tmp_path, capsys, more, message):
    assert run(trained_dir, tmp_path / "result", *more) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "result").exists()


def test_all_checkpoints_are_the_runs_own(tmp_path):
    for step, run_id in ((2, "first"), (4, "first"), (6, "first"), (99, "foreign")):
        write_state(tmp_path, step, run_id)
    everything = ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-99"]
    assert find_checkpoints(tmp_path, ["all"]) == everything  # no run.json
    (tmp_path / "run.json").write_text(json.dumps(dict(run_id="second", ancestors=[["first", 2]])))
    assert find_checkpoints(tmp_path, ["all"]) == ["checkpoint-2"]
    assert find_checkpoints(tmp_path, ["all", "4"]) == ["checkpoint-2", "checkpoint-4"]


def test_checkpoints_are_found_by_step(trained_dir, tmp_path):
    assert find_checkpoints(trained_dir, ["all"]) == ["checkpoint-5", "checkpoint-10"]
    assert find_checkpoints(trained_dir, ["10", "checkpoint-5", "all"]) == ["checkpoint-5", "checkpoint-10"]
    assert find_checkpoints(trained_dir, []) == []
    assert parse_args(["--only", "report", "--only", "score"]).stages == ("score", "report")


# score


def test_metrics_are_what_the_functions_give_for_the_images(whole, models, photos_dir):
    record = read(whole, "metrics.json")
    cpu = torch.device("cpu")
    clip, dino = encoders.load_clip(Path(models[1]), cpu), encoders.load_dino(Path(models[3]), cpu)
    photos = [decode(path) for path in sorted(photos_dir.iterdir())]
    files = [["output-1.png", "output-2.png"]]
    files += [[f"images/finetuned/a-sks-cat-on-the-beach/seed-{seed}.png" for seed in (1000, 1001)]]
    images = [[decode(whole / file) for file in row] for row in files]
    found = record["models"]["finetuned"]
    for encoder, fidelity, suffix in ((clip, "clip_i", "clip"), (dino, "dino", "dino")):
        rows, real = np.array([encoder.images(row) for row in images]), encoder.images(photos)
        flat = rows.reshape(4, -1)
        assert found[fidelity]["value"] == pytest.approx((flat @ real.T).mean(), abs=1e-6)
        apart = np.mean([1 - row[0] @ row[1] for row in rows])
        assert found[f"div_{suffix}"]["value"] == pytest.approx(apart, abs=1e-6)
        assert record["photos"][f"real_{suffix}"]["value"] == pytest.approx(
            metrics.real_similarity(real).mean(), abs=1e-6
        )
        of_class = encoder.images(
            [decode(whole / f"images/finetuned/a-photo-of-a-cat/seed-{seed}.png") for seed in (0, 1)]
        )
        assert found[f"pres_{suffix}"]["value"] == pytest.approx((of_class @ real.T).mean(), abs=1e-6)
    texts = clip.texts(["a photo of a cat", "a cat on the beach"])
    expected = np.mean([clip.images(row) @ text for row, text in zip(images, texts, strict=True)])
    assert found["clip_t"]["value"] == pytest.approx(expected, abs=1e-6)


def test_changes_are_differences_to_the_baseline_image_by_image(whole):
    record = read(whole, "metrics.json")
    assert len(record["encoders"]["clip"]["sha256"]["model.safetensors"]) == 64
    assert record["samples_id"] == read(whole, "samples.json")["samples_id"]
    for key, change in record["changes"]["finetuned"].items():
        ours, theirs = (record["models"][model][key]["value"] for model in ("finetuned", "baseline"))
        assert change["value"] == pytest.approx(ours - theirs) and change["unit"] in ("prompts", "images", None)
    assert record["changes"]["finetuned"].keys() == metrics.METRICS.keys()


@pytest.mark.parametrize(("name", "role"), [("others", "other"), ("places", "place")])
def test_pictures_are_held_against_the_prompts_of_their_kind_that_were_drawn(whole, models, name, role):
    clip = encoders.load_clip(Path(models[1]), torch.device("cpu"))
    found = read(whole, "metrics.json")[name]["finetuned"]
    prompts = [other["prompt"] for other in found]
    assert prompts == [prompt["text"] for prompt in read(whole, "samples.json")["prompts"] if prompt["role"] == role]
    texts = [*prompts, "a photo of a cat"]
    of_any = clip.texts([text.replace("sks cat", "a cat") for text in texts])
    nearest = (clip.images([decode(whole / other["file"]) for other in found]) @ of_any.T).argmax(axis=1)
    assert [other["nearest"] for other in found] == [texts[place] for place in nearest]
    assert [other["kept"] for other in found] == [texts[place] == p for place, p in zip(nearest, prompts, strict=True)]


def test_each_image_is_embedded_once(whole, models, tmp_path, monkeypatch):
    embedded = []
    monkeypatch.setattr(
        encoders.Encoder, "images", lambda self, images: embedded.append(len(images)) or of_size(images)
    )
    folder = shutil.copytree(whole, tmp_path / "result")
    again = ["--only", "score", "--output_dir", str(folder), *models]
    before = read(folder, "metrics.json")
    assert run_main(evaluate.main, again) == 0 and embedded == []
    after = read(folder, "metrics.json")
    assert "--only score" in after.pop("command") and "--only" not in before.pop("command") and after == before
    Image.new("RGB", (32, 32), (9, 9, 9)).save(folder / "output-1.png")
    assert run_main(evaluate.main, again) == 0 and embedded == [1, 1]  # by CLIP, by DINO
    (folder / "embeddings.npz").write_bytes(b"PK written_by_evaluate")
    assert run_main(evaluate.main, again) == 0 and len(embedded) == 2 + 4  # the images and the photos of each


def of_size(images) -> np.ndarray:
    return np.tile(np.eye(16)[0], (len(images), 1))


def test_without_models_every_metric_says_what_it_needs(result):
    assert run_main(evaluate.main, ["--only", "score", "--output_dir", str(result)]) == 0
    record = read(result, "metrics.json")
    assert record["models"]["finetuned"].pop("blank_images") == []
    for entry in record["models"]["finetuned"].values():
        assert entry["value"] is None and entry["reason"].startswith("needs ")
    assert "--clip_model" in record["models"]["finetuned"]["clip_i"]["reason"]
    assert "--dino_model" in record["models"]["finetuned"]["pres_dino"]["reason"]
    said = record["says"]["finetuned"]
    assert [sentence["kind"] for sentence in said["sentences"]] == ["copies"]  # that needs no encoder
    assert len(said["unmeasured"]) == 2 and all("--clip_model" in line for line in said["unmeasured"])


def test_clip_i_from_the_pipelines_own_safety_checker(trained_dir, tiny_pipeline_dir, tmp_path, photos_dir, capsys):
    base = write_safety_checker(shutil.copytree(tiny_pipeline_dir, tmp_path / "base"))
    result = tmp_path / "result"
    assert run(trained_dir, result, "--pretrained_model_name_or_path", str(base)) == 0
    record = read(result, "metrics.json")
    assert record["encoders"]["clip"]["folder"] == str(base / "safety_checker")
    found = record["models"]["finetuned"]
    encoder = encoders.load_safety_checker(base, torch.device("cpu"))
    real = encoder.images([decode(path) for path in sorted(photos_dir.iterdir())])
    images = encoder.images([decode(result / f"output-{number}.png") for number in (1, 2)])
    assert found["clip_i"]["value"] == pytest.approx((images @ real.T).mean(), abs=1e-6)
    assert found["clip_t"]["value"] is None and "text tower" in found["clip_t"]["reason"]
    said = record["says"]["finetuned"]
    assert [each["kind"] for each in said["sentences"]] == ["scorer", "copies"]  # random weights know no photos
    out = capsys.readouterr().out
    assert all(sentence["text"] in " ".join(out.split()) for sentence in said["sentences"])
    assert not any(line in " ".join(out.split()) for line in said["unmeasured"])


def test_no_photos_one_photo_one_image(trained_dir, tmp_path, models, photos_dir):
    folder = shutil.copytree(trained_dir, tmp_path / "output")
    run_json = folder / "run.json"
    run_json.write_text(run_json.read_text().replace(str(photos_dir), str(tmp_path / "gone")))
    assert run(folder, tmp_path / "result", *models, "--num_images", "1", "--num_drift_images", "0") == 0
    values = read(tmp_path / "result", "metrics.json")
    assert "--instance_data_dir" in values["models"]["finetuned"]["clip_i"]["reason"]
    assert "--num_images" in values["models"]["finetuned"]["div_clip"]["reason"]
    assert values["models"]["finetuned"]["clip_t"]["value"] is not None
    assert values["changes"]["finetuned"]["clip_t"]["interval"] is None
    assert values["says"]["finetuned"]["sentences"] == [] and len(values["says"]["finetuned"]["unmeasured"]) == 3
    (tmp_path / "one").mkdir()
    shutil.copy(photos_dir / "photo-0.jpg", tmp_path / "one")
    more = ["--only", "score", "--output_dir", str(tmp_path / "result"), *models]
    assert run_main(evaluate.main, [*more, "--instance_data_dir", str(tmp_path / "one")]) == 0
    values = read(tmp_path / "result", "metrics.json")
    assert values["models"]["finetuned"]["clip_i"]["value"] is not None
    assert values["photos"]["real_clip"] == dict(value=None, reason="needs two different photos or more")
    assert run_main(evaluate.main, ["--only", "report", "--output_dir", str(tmp_path / "result")]) == 0
    page = (tmp_path / "result/report.html").read_text()
    assert "Your photo photo-0.jpg" in page  # of the scores; the images were drawn without any
    assert page.count("python evaluate.py") == 2 and f"--instance_data_dir {tmp_path / 'one'}" in page


def test_images_of_one_colour_and_photos_drawn_again_are_found(whole, photos_dir, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "result")
    black, copied = "images/finetuned/a-sks-cat-on-the-beach/seed-1001.png", "output-2.png"
    Image.new("RGB", (32, 32)).save(folder / black)
    photo = decode(photos_dir / "photo-2.jpg")
    ImageOps.mirror(ImageOps.fit(photo, (64, 64))).save(folder / copied)
    assert run_main(evaluate.main, ["--only", "score", "--output_dir", str(folder)]) == 0
    record = read(folder, "metrics.json")
    assert record["models"]["finetuned"]["blank_images"] == [black]
    assert record["models"]["baseline"]["blank_images"] == []
    (pair,) = record["copies"]["finetuned"]
    assert (pair["file"], pair["photo"]) == (copied, "photo-2.jpg") and record["copies"]["checkpoint-5"] == []
    (sentence,) = [each for each in record["says"]["finetuned"]["sentences"] if each["kind"] == "copies"]
    assert sentence["text"].startswith("1 of 8 pictures of your subject is one of your photos again (95%: ")


def test_scoring_again_does_not_depend_on_the_folder_it_is_called_from(
    trained_dir, photos_dir, models, tmp_path, monkeypatch, capsys
):
    shutil.copytree(photos_dir, tmp_path / "photos")
    shutil.copytree(trained_dir, tmp_path / "output")
    monkeypatch.chdir(tmp_path)
    assert run(Path("output"), Path("result"), "--instance_data_dir", "photos", *models) == 0
    samples, first = read(Path("result"), "samples.json"), read(Path("result"), "metrics.json")
    assert (samples["instance_data_dir"], samples["models"]["finetuned"]["path"]) == ("photos", "output")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = ["--only", "score", "--output_dir", "../result", *models]
    assert run_main(evaluate.main, again) == 0
    assert read(tmp_path / "result", "metrics.json")["models"] == first["models"]
    assert run_main(evaluate.main, ["--only", "report", "--output_dir", "../result"]) == 0
    page = (tmp_path / "result/report.html").read_text()
    assert "Your photo photo-0.jpg" in page and str(tmp_path / "output") not in page
    (tmp_path / "photos").rename(tmp_path / "moved")
    before = (tmp_path / "result/metrics.json").read_bytes()
    assert run_main(evaluate.main, again) == 2
    said = capsys.readouterr().err
    assert f"are not at {tmp_path / 'photos'}: say where they are by --instance_data_dir" in said
    assert (tmp_path / "result/metrics.json").read_bytes() == before
    assert run_main(evaluate.main, [*again, "--instance_data_dir", "../moved"]) == 0


def test_a_baseline_that_is_gone_does_not_cost_the_scores(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "result")
    samples, before = read(folder, "samples.json"), (folder / "metrics.json").read_bytes()
    samples["models"]["baseline"]["path"] = str(tmp_path / "gone")
    (folder / "samples.json").write_text(json.dumps(samples))
    assert run_main(evaluate.main, ["--only", "score", "--output_dir", str(folder)]) == 2
    assert f"is not at {tmp_path / 'gone'}: give --clip_model, or draw again" in capsys.readouterr().err
    assert (folder / "metrics.json").read_bytes() == before


def test_a_model_that_draws_no_numbers_is_named(trained_dir, tmp_path, capsys):
    folder = shutil.copytree(trained_dir, tmp_path / "output")
    weights = load_file(folder / UNET_FILE)
    weights["conv_out.bias"].fill_(3e38)  # finite, but what it gives is not
    save_file(weights, folder / UNET_FILE, {"format": "pt"})
    assert run(folder, tmp_path / "result", "--num_drift_images", "0") == 2
    assert "error: finetuned: the images of" in capsys.readouterr().err
    assert not (tmp_path / "result/metrics.json").exists()


def test_an_encoder_that_gives_no_numbers_is_named(whole, models, tmp_path, capsys):
    for place, kind in ((1, "clip"), (3, "dino")):
        folder = shutil.copytree(models[place], tmp_path / kind)
        weights = load_file(folder / "model.safetensors")
        name = min(name for name, value in weights.items() if value.is_floating_point() and value.dim() > 1)
        weights[name].view(-1)[0] = float("nan")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        command = ["--only", "score", "--output_dir", str(whole), f"--{kind}_model", str(folder)]
        before = (whole / "metrics.json").read_bytes()
        assert run_main(evaluate.main, command) == 2
        assert f"{folder}: its features of" in capsys.readouterr().err
        assert (whole / "metrics.json").read_bytes() == before


def test_a_photo_that_cannot_be_read_is_refused_as_in_training(whole, models, photos_dir, tmp_path, capsys):
    photos = shutil.copytree(photos_dir, tmp_path / "photos")
    (photos / "photo-9.jpg").write_bytes((photos / "photo-0.jpg").read_bytes()[:200])
    command = ["--only", "score", "--output_dir", str(whole), "--instance_data_dir", str(photos), *models]
    assert run_main(evaluate.main, command) == 2
    assert "photo-9.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("clip", "dino", "dreambench", "keys"),
    [
        ("clip-vit-base-patch32", "dino-vits16", "live", {"dino", "clip_i", "clip_t"}),
        ("clip-vit-base-patch32", None, "object", {"clip_i", "clip_t"}),
        ("tiny-clip", "dino-vits16", "live", {"dino"}),
        ("clip-vit-base-patch32", "dino-vits16", None, set()),
        ("safety_checker", None, "live", set()),
    ],
)
def test_the_papers_numbers_stand_beside_its_encoders_and_prompts_alone(clip, dino, dreambench, keys):
    record = dict(encoders=dict(clip=dict(folder=f"model/{clip}"), dino=dino and dict(folder=f"model/{dino}")))
    found = paper_columns(record, dict(dreambench=dreambench))
    assert {key for row in found.values() for key in row} == keys
    assert "dino" not in keys or found["DreamBooth, Stable Diffusion"]["dino"] == 0.668


# report


def test_the_report_shows_everything(whole):
    page = (whole / "report.html").read_text()
    for text in ("CLIP-T", "step 5", "a sks cat on the beach"):
        assert text in page, text
    assert page.count('id="image-') == 4 * IMAGES + 4
    assert page.count("data:image/") == page.count("<img ") == page.count(' alt="')
    assert "torchrun train_dreambooth_colossalai.py" in page and "python evaluate.py" in page
    assert "http-equiv" in page and "<script src" not in page
    assert "0.774" not in page and "0.668" not in page  # the paper's numbers are of other encoders


def test_metrics_of_other_images_are_not_shown(whole, trained_dir, tmp_path):
    result = shutil.copytree(whole, tmp_path / "result")
    assert "Not scored yet" not in (result / "report.html").read_text()
    assert run(trained_dir, result, "--seed", "7", "--only", "generate", "--only", "report") == 0
    assert "Not scored yet" in (result / "report.html").read_text()


@pytest.mark.parametrize("stage", ["score", "report"])
def test_a_folder_without_images_is_named(tmp_path, capsys, stage):
    assert run_main(evaluate.main, ["--only", stage, "--output_dir", str(tmp_path / "result")]) == 2
    assert "run evaluate.py without --only first" in capsys.readouterr().err
    assert not (tmp_path / "result").exists()


def test_an_older_or_unfinished_samples_json_is_refused(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "result")
    samples = read(folder, "samples.json")
    for broken in (samples | dict(complete=False), {k: v for k, v in samples.items() if k != "prompts"}):
        (folder / "samples.json").write_text(json.dumps(broken))
        assert run_main(evaluate.main, ["--only", "report", "--output_dir", str(folder)]) == 2
        assert "--only generate" in capsys.readouterr().err
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / samples["images"][0]["file"]).unlink()
    assert run_main(evaluate.main, ["--only", "score", "--output_dir", str(folder)]) == 2
    assert "is missing" in capsys.readouterr().err
