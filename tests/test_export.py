"""python -m utils.export: which folder and base it takes, what it writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers import evaluating
from tests.helpers.pipelines import header, write_pipeline
from tests.helpers.script import ROOT, UNET_FILE, run
from utils import PROGRAM
from utils.command_line import run_main
from utils.export import main
from utils.models.card import MARK, write_card
from utils.models.folder import read_base
from utils.models.single_file import export_single_file
from utils.run.lineage import FORMAT, STATE_FILE


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_pipeline_dir) -> Path:
    """What training leaves, with one checkpoint. Never write into it."""
    folder = write_pipeline(tmp_path_factory.mktemp("run") / "output", seed=1)
    shutil.copytree(write_pipeline(folder.parent / "other", seed=2) / "unet", folder / "checkpoint-2" / "unet")
    (folder / "checkpoint-2" / STATE_FILE).write_text(json.dumps(dict(program=PROGRAM, format=FORMAT, step=2)))
    arguments = dict(pretrained_model_name_or_path=str(tiny_pipeline_dir), instance_prompt="a photo of my cat.")
    run = dict(program=PROGRAM, status="complete", arguments=arguments | dict(max_train_steps=3))
    (folder / "run.json").write_text(json.dumps(run | dict(result=dict(num_steps=3, final_loss=0.25))))
    (folder / "validation").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "validation/step-000003-seed-0.png")
    return folder


def export(*argv) -> int:
    return run_main(main, [str(word) for word in argv])


def blended(base: Path, tuned: Path, strength: float) -> dict[str, torch.Tensor]:
    before, after = load_file(base / UNET_FILE), load_file(tuned / UNET_FILE)
    return {name: before[name] + strength * (after[name] - before[name]) for name in before}


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_a_folder_at_a_strength_is_a_whole_pipeline(tuned, tiny_pipeline_dir, tmp_path):
    target = tmp_path / "new" / "my-cat"
    assert export(tuned, target, "--strength", 0.75) == 0
    assert equal(load_file(target / UNET_FILE), blended(tiny_pipeline_dir, tuned, 0.75))
    record = json.loads((target / "run.json").read_text())
    assert (record["strength"], record["exported_from"]) == (0.75, str(tuned))
    assert record["arguments"]["instance_prompt"] == "a photo of my cat."
    assert export(target, tmp_path / "again", "--strength", 0.5) == 0
    assert equal(load_file(tmp_path / "again" / UNET_FILE), blended(tiny_pipeline_dir, tuned, 0.375))
    assert json.loads((tmp_path / "again/run.json").read_text())["strength"] == 0.375


def test_an_earlier_exports_scores_and_picture_do_not_stay_beside_other_weights(tuned, tmp_path):
    target = tmp_path / "cat"
    assert export(tuned, target, "--checkpoint", 2) == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")
    scores = dict(models=dict(baseline=dict(clip_i=dict(value=0.5)), finetuned=dict(clip_i=dict(value=0.75))))
    assert write_card(read_base(target), metrics=scores, picture=tmp_path / "sheet.png")
    assert export(tuned, target, "--strength", 0.25) == 0
    text = (target / "README.md").read_text(encoding="utf-8")
    assert "CLIP-I" not in text and "comparison.png" not in text and not (target / "comparison.png").exists()
    assert "| strength | 0.25 times the way" in text and "| max_train_steps | 3 |" in text
    mine = text.replace(MARK, "")
    (target / "README.md").write_text(mine)
    assert export(tuned, target) == 0 and (target / "README.md").read_text() == mine


def test_a_checkpoint_at_a_strength_and_how_it_is_named_wherever_an_export_says_what_it_is(
    tuned, tiny_pipeline_dir, tmp_path
):
    flags = ["--checkpoint", 2, "--strength", 0.5]
    assert export(tuned, tmp_path / "cat", *flags) == 0
    expected = blended(tiny_pipeline_dir, tuned / "checkpoint-2", 0.5)
    assert equal(load_file(tmp_path / "cat" / UNET_FILE), expected)
    record = json.loads((tmp_path / "cat/run.json").read_text())
    assert record["result"] == dict(num_steps=2)  # the loss is the result's
    assert (record["checkpoint_step"], record["strength"]) == (2, 0.5)
    card = (tmp_path / "cat/README.md").read_text(encoding="utf-8")
    assert "| max_train_steps | 2 of 3 |" in card and "| strength | 0.5 times the way" in card
    for source, name, more in (
        (tuned, "one", flags),
        (tuned, "lora", [*flags, "--lora_rank", 2]),
        (tmp_path / "cat", "again", []),
    ):
        assert export(source, tmp_path / f"{name}.safetensors", *more) == 0
        found = header(tmp_path / f"{name}.safetensors")
        assert found["modelspec.description"].endswith(", 2 steps, at strength 0.5"), name


def test_the_plain_result_is_said_as_ever(tuned, tmp_path):
    assert export(tuned, tmp_path / "one.safetensors") == export(tuned, tmp_path / "cat") == 0
    export_single_file(read_base(tuned), tmp_path / "two" / "one.safetensors")
    assert header(tmp_path / "one.safetensors") == header(tmp_path / "two/one.safetensors")
    record = json.loads((tuned / "run.json").read_text())
    assert json.loads((tmp_path / "cat/run.json").read_text()) == record | dict(exported_from=str(tuned))
    card = (tmp_path / "cat/README.md").read_text(encoding="utf-8")
    assert "| max_train_steps | 3 |" in card and "strength" not in card


def test_what_is_the_users_is_refused_in_one_line(tuned, tmp_path, capsys):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    without_run = write_pipeline(tmp_path / "plain")
    other = ["--pretrained_model_name_or_path", ROOT / "model/tiny-stable-diffusion"]
    capsys.readouterr()
    for argv, message in (
        ((tuned, foreign), "holds files that no export wrote"),
        ((tuned, tuned), "overlaps"),
        ((tuned, tuned / "inside"), "overlaps"),
        ((tuned, tmp_path / "my-cat.ckpt"), "a single file is safetensors"),
        ((tuned, tmp_path / "folder", "--lora_rank", 4), "a single file is safetensors"),
        ((tuned, tmp_path / "new", "--checkpoint", 7), "holds no whole checkpoint-7"),
        ((tuned, tmp_path / "new", "--strength", -1), "--strength"),
        ((tuned, tmp_path / "new", "--lora_rank", 0), "--lora_rank"),
        ((without_run, tmp_path / "new", "--strength", 0.5), "--pretrained_model_name_or_path is missing"),
        ((tuned, tmp_path / "new", "--strength", 0.5, "--pretrained_model_name_or_path", "gone"), "gone"),
        ((tuned, tmp_path / "l.safetensors", "--lora_rank", 4, *other), f"error: {other[1]}: its UNet and"),
        ((tuned, tmp_path / "l.safetensors", "--lora_rank", 4, "--strength", 0), "--strength 0 is the base itself"),
    ):
        assert export(*argv) == 2
        stderr = capsys.readouterr().err
        assert message in stderr and stderr.count("\n") == 1, stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "plain"]


def test_a_base_that_was_replaced_since_is_refused(flags, base, output, tmp_path, capsys):
    """A LoRA, or a place on the way, of two unrelated models is noise; one that is given by its flag may be meant."""
    run(flags, pretrained_model_name_or_path=base)
    weaker = (output, tmp_path / "weaker", "--strength", 0.5)
    assert export(*weaker) == 0
    write_pipeline(base, seed=3)
    for argv in (weaker, (output, tmp_path / "l.safetensors", "--lora_rank", 2)):
        assert export(*argv) == 2
        said = capsys.readouterr().err
        assert f"error: {base / UNET_FILE} is not what was trained from, by {output / 'run.json'}" in said
    assert export(*weaker, "--pretrained_model_name_or_path", base) == 0
    assert "warning: " in capsys.readouterr().err
    assert evaluating.run(output, tmp_path / "result", "--num_drift_images=0", "--only=generate") == 0
    assert f"warning: {base / UNET_FILE} is not what {output} was trained from" in capsys.readouterr().err
