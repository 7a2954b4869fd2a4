"""Several subjects of one model: each with its own photos, prompt and folder."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import evaluating
from tests.helpers.encoders import write_clip
from tests.helpers.pipelines import write_photos
from utils.concepts import read_list
from utils.errors import UserError
from utils.evaluation.arguments import parse_args
from utils.evaluation.plan import make_plan
from utils.evaluation.subjects import split_by_subject


@pytest.fixture
def concepts(tmp_path, photos_dir) -> Path:
    """A list of two subjects, with fields that only training reads."""
    path = tmp_path / "concepts.json"
    dogs = write_photos(tmp_path / "dogs", 3, size=(64, 64))
    subjects = [
        ("a photo of sks cat", photos_dir, "a photo of a cat"),
        ("a photo of rex dog", dogs, "a photo of a dog"),
    ]
    names = ("instance_prompt", "instance_data_dir", "class_prompt")
    path.write_text(json.dumps([dict(zip(names, map(str, subject), strict=True)) for subject in subjects]))
    return path


@pytest.fixture
def trained(tmp_path, tiny_pipeline_dir) -> Path:
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "output")


def run(base: Path, trained: Path, result: Path, *more: str) -> int:
    return evaluating.run(trained, result, f"--pretrained_model_name_or_path={base}", *more)


def test_each_subject_is_scored_with_its_own_photos(tiny_pipeline_dir, trained, concepts, tmp_path, capsys):
    result, clip = tmp_path / "result", str(write_clip(tmp_path / "clip"))
    assert run(tiny_pipeline_dir, trained, result, "--concepts_list", str(concepts), "--clip_model", clip) == 0
    folders = [result / "01-a-photo-of-sks-cat", result / "02-a-photo-of-rex-dog"]
    photos = [json.loads((folder / "metrics.json").read_text())["photos"]["files"] for folder in folders]
    assert list(map(len, photos)) == [4, 3]
    assert all((folder / "report.html").is_file() for folder in folders)
    prompts = [json.loads((folder / "samples.json").read_text())["prompts"][0]["text"] for folder in folders]
    assert prompts == ["a photo of sks cat", "a photo of rex dog"]
    assert "README.md has" not in capsys.readouterr().out  # the card is of one subject


def test_a_run_of_several_subjects_is_evaluated_so_without_being_told(trained, concepts):
    (trained / "run.json").write_text(json.dumps(dict(arguments=dict(concepts_list=str(concepts)))))
    flags = ["--finetuned_model_name_or_path", str(trained)]
    assert [args.prompt for args in split_by_subject(parse_args(flags))] == [
        ["a photo of sks cat"],
        ["a photo of rex dog"],
    ]
    assert len(split_by_subject(parse_args([*flags, "--prompt", "a photo"]))) == 1


@pytest.mark.parametrize("flag", [["--prompt", "x"], ["--instance_data_dir", "x"], ["--choose"]])
def test_what_is_for_one_subject_is_refused_beside_several(concepts, flag):
    with pytest.raises(UserError, match=f"--concepts_list names several subjects, and {flag[0]} is for one"):
        split_by_subject(parse_args(["--concepts_list", str(concepts), *flag]))


def test_what_was_drawn_is_found_again_without_the_model(tiny_pipeline_dir, trained, concepts, tmp_path):
    result, report = tmp_path / "result", ["--only", "report", "--output_dir", str(tmp_path / "result")]
    assert run(tiny_pipeline_dir, trained, result, "--prompt", "a photo", "--only", "generate") == 0
    assert [args.output_dir for args in split_by_subject(parse_args(report))] == [result]
    assert run(tiny_pipeline_dir, trained, result, "--concepts_list", str(concepts), "--only", "generate") == 0
    folders = [result / "01-a-photo-of-sks-cat", result / "02-a-photo-of-rex-dog"]
    assert [args.output_dir for args in split_by_subject(parse_args(report))] == folders
    assert run(tiny_pipeline_dir, trained, result, "--prompt", "a photo", "--only", "generate") == 0
    assert [args.output_dir for args in split_by_subject(parse_args(report))] == [result]


def planned(trained: Path, concepts: Path | None) -> list[tuple]:
    """(class, identifier) of each subject, evaluated with --concepts_list, or without flags."""
    more = ["--concepts_list", str(concepts)] if concepts else []
    args = parse_args(["--finetuned_model_name_or_path", str(trained), *more])
    plans = [make_plan(each) for each in split_by_subject(args)]
    return [(plan.class_name, plan.identifier) for plan in plans]


def write_run(trained: Path, base: Path, photos: list[dict], **arguments) -> None:
    arguments |= dict(pretrained_model_name_or_path=str(base))
    (trained / "run.json").write_text(json.dumps(dict(arguments=arguments, photos=photos)))


def test_each_subject_is_called_what_its_own_photos_were_trained_with(tiny_pipeline_dir, trained, concepts):
    cats, dogs = ([each.instance_data_dir] * 2 for each in read_list(concepts))
    captions = ["my cat on a rug", "my cat", "a photo of sks dog", "a photo of sks dog"]
    photos = [dict(folder=str(folder), prompt=text) for folder, text in zip(cats + dogs, captions, strict=True)]
    write_run(trained, tiny_pipeline_dir, photos, concepts_list=str(concepts))
    assert planned(trained, None) == [("cat", "my"), ("dog", "sks")]
    alone = ["--finetuned_model_name_or_path", str(trained), "--prompt", "a photo of sks dog"]
    assert make_plan(parse_args(alone)).class_name == "dog"  # of one subject alone, whose photos are not named


@pytest.mark.parametrize("class_prompt", [None, "a photo of my cat", "a photo of a cat"])
def test_a_subject_that_the_run_does_not_know_is_called_by_its_own_prompt(
    tiny_pipeline_dir, trained, concepts, class_prompt
):
    run = dict(instance_prompt="a photo of my cat", class_prompt=class_prompt)
    cats, dogs = (str(each.instance_data_dir) for each in read_list(concepts))
    write_run(trained, tiny_pipeline_dir, [{}, {}], instance_data_dir=cats, **run)
    assert planned(trained, concepts) == [("cat", "my"), ("dog", "rex")]
    second = dict(instance_prompt="a photo of rex dog", class_prompt="a photo of sks cat")  # the first one preserved
    write_run(trained, tiny_pipeline_dir, [{}, {}], instance_data_dir=dogs, **second)
    assert planned(trained, concepts) == [("cat", "sks"), ("dog", "rex")]


def test_photos_that_have_moved_are_still_the_runs(tiny_pipeline_dir, trained, photos_dir):
    write_run(trained, tiny_pipeline_dir, [{}], instance_data_dir="gone", instance_prompt="a photo of my cat")
    flags = ["--finetuned_model_name_or_path", str(trained), "--instance_data_dir", str(photos_dir)]
    plan = make_plan(parse_args([*flags, "--prompt", "a photo of it"]))
    assert (plan.class_name, plan.identifier) == ("cat", "my")


def test_what_corrects_the_class_of_one_of_several_is_not_refused(tiny_pipeline_dir, trained, concepts):
    entries = json.loads(concepts.read_text())
    for entry in entries:
        entry.update(instance_prompt="a photo of sks", class_prompt=None)
    concepts.write_text(json.dumps(entries[:1]))
    write_run(trained, tiny_pipeline_dir, [], concepts_list=str(concepts))
    flags = parse_args(["--finetuned_model_name_or_path", str(trained)])
    (notes,) = [make_plan(each).notes for each in split_by_subject(flags)]
    assert 'say what the subject is one of by a "class_prompt" in --concepts_list' in notes[-1][1]
    concepts.write_text(json.dumps([entries[0] | dict(class_prompt="a photo of a cat")]))
    assert planned(trained, None) == [("cat", "sks")]
