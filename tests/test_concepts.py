"""Subjects and their prompts: captions beside the photos, and lists of several subjects."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.pipelines import write_photos
from tests.helpers.script import as_argv, losses, run, run_json
from train_dreambooth_colossalai import main
from utils.concepts import Concept, read_concepts
from utils.data.inputs import BatchSource
from utils.errors import UserError


def test_captions_replace_the_prompt_photo_by_photo(flags, tmp_path):
    expected = losses(run(flags, train_batch_size=4))
    photos = write_photos(tmp_path / "photos")
    flags |= dict(instance_data_dir=photos, train_batch_size=4, output_dir=tmp_path / "b")
    for number in range(4):
        (photos / f"photo-{number}.txt").write_text(f" {flags['instance_prompt']}\n", encoding="utf-8-sig")
    assert losses(run(flags, instance_prompt="not used")) == pytest.approx(expected, rel=1e-6)
    (photos / "photo-1.txt").write_text("my cat asleep\n")
    found = losses(run(flags, overwrite_output_dir=True))
    assert found[0] != pytest.approx(expected[0], rel=1e-6)
    record = run_json(tmp_path / "b")
    assert [photo.get("prompt") for photo in record["photos"]] == [None, "my cat asleep", None, None]
    assert record["skipped_files"] == []


REPLACED = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir")


def without_subject(flags: dict, entries: object, tmp_path: Path) -> dict:
    """The flags with --concepts_list in the place of those that it replaces."""
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(entries))
    return {name: value for name, value in flags.items() if name not in REPLACED} | dict(concepts_list=path)


def concept_entry(flags: dict) -> dict:
    return {name: str(flags[name]) for name in REPLACED if name in flags}


def test_a_list_of_one_concept_is_the_flags(prior, tmp_path):
    expected = losses(run(prior))
    listed = without_subject(prior, [concept_entry(prior)], tmp_path)
    assert losses(run(listed, output_dir=tmp_path / "b")) == expected


def test_two_subjects_of_two_classes(prior, tmp_path, capsys):
    dogs = dict(instance_prompt="a photo of my dog.", instance_data_dir=str(write_photos(tmp_path / "dogs", 2)))
    dogs |= dict(class_prompt="a photo of a dog.", class_data_dir=str(tmp_path / "class-dog"))
    listed = without_subject(prior, [concept_entry(prior), dogs], tmp_path)
    found = run(listed, train_batch_size=3)
    said = capsys.readouterr().out
    assert said.count("have 0, need 5, will make 5") == 2
    assert "6 photos at 32 px, 2 prompts 'a photo of my cat.', 'a photo of my dog.'" in said
    assert len(list((tmp_path / "class-dog").glob("*.png"))) == 5
    assert all(np.isfinite(row["class_loss"]) for row in found)


def test_a_list_that_is_moved_after_the_start_is_not_missed(prior, tmp_path, monkeypatch):
    listed = without_subject(prior, [concept_entry(prior)], tmp_path)
    micro_batches = BatchSource.micro_batches

    def and_move(self, step: int) -> list:
        if step == 0:
            (tmp_path / "concepts.json").rename(tmp_path / "moved.json")
        return micro_batches(self, step)

    monkeypatch.setattr(BatchSource, "micro_batches", and_move)
    run(listed, checkpointing_steps=2)
    state = json.loads((tmp_path / "output/checkpoint-2/state.json").read_text())
    assert len(state["determines"]["class_images"]) == 5
    assert main(as_argv(listed | dict(concepts_list=tmp_path / "moved.json", resume_from_checkpoint="latest"))) == 0


def test_the_class_fields_of_a_list_are_for_prior_preservation_only(flags, tmp_path):
    entry = concept_entry(flags) | dict(class_prompt="a cat", class_data_dir=str(tmp_path / "class"))
    expected = losses(run(flags))
    assert losses(run(without_subject(flags, [entry], tmp_path), output_dir=tmp_path / "b")) == expected
    assert not (tmp_path / "class").exists()


GOOD = dict(instance_prompt="my cat", instance_data_dir="cats", class_prompt="a cat", class_data_dir="class")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "is not a list of objects"),
        ([], "is not a list of objects"),
        (["cats"], "is not a list of objects"),
        ([GOOD, GOOD | dict(instance_prompt=" ")], "concept 2: 'instance_prompt' is missing or empty$"),
        ([{"instance_prompt": "my cat"}], "concept 1: 'instance_data_dir' is missing or empty$"),
        ([GOOD | dict(class_data_dir=3)], "'class_data_dir' is missing or empty, which --with_prior_preservation"),
        ([GOOD | dict(num_class_images=3)], "there is no field 'num_class_images'"),
        ([GOOD | dict(class_data_dir="cats")], "--class_data_dir cats overlaps cats"),
        ([GOOD, GOOD | dict(instance_data_dir="dogs", class_data_dir="cats")], "--class_data_dir cats overlaps cats"),
        ([GOOD | dict(class_data_dir="output/class")], "--class_data_dir output/class overlaps output"),
        ([GOOD | dict(instance_data_dir="output")], "--output_dir output overlaps the photos' folder output"),
        ([GOOD, GOOD | dict(class_prompt="a dog")], "is given for two class prompts: give each a folder of its own"),
    ],
)
def test_a_malformed_list_of_concepts(tmp_path, entries, message):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message):
        read(path)


def read(path: Path) -> list[Concept]:
    return read_concepts(Concept(None, None, None, None), path, Path("output"), with_prior_preservation=True)


def test_a_list_that_is_no_json(tmp_path):
    (tmp_path / "concepts.json").write_text("[")
    for path in (tmp_path / "missing", tmp_path / "concepts.json"):
        with pytest.raises(UserError, match="--concepts_list .*cannot be read"):
            read(path)
