"""Which pictures the page shows where, and what stands below them."""

import json
from pathlib import Path

import pytest

from tests.helpers.pipelines import edit_json
from tests.helpers.results import write_result
from utils.evaluation.photos import load_photos
from utils.evaluation.report.gallery import Album, choice_images, first_row, pairs, rest, second_row, strip


@pytest.fixture
def result(tmp_path, photos_dir):
    return write_result(tmp_path, photos_dir, prompt="a cat")


def read(result) -> tuple[Album, dict]:
    samples, metrics = (json.loads((result / name).read_text()) for name in ("samples.json", "metrics.json"))
    return Album(result, samples, metrics, load_photos(Path(samples["instance_data_dir"]))), metrics


def files(sets) -> list[list[str]]:
    return [[cell.file.removesuffix(".png") for cell in each.cells] for each in sets]


def test_the_first_rows_are_one_seed_of_each(result):
    album, _ = read(result)
    photos, *drawn = files(first_row(album))
    assert photos == list(album.photos) and len(photos) == 4
    assert drawn == [["images/baseline/000-x/seed-0"], ["images/finetuned/000-x/seed-0"]]
    places = [
        [f"images/{model}/00{number}-x/seed-{number}000" for model in ("baseline", "finetuned")]
        for number in (1, 2, 3, 4)
    ]
    assert files(second_row(album)) == places


def test_many_prompts_are_places_themselves(tmp_path, photos_dir):
    album, _ = read(write_result(tmp_path, photos_dir, prompt="a cat", num_prompts=6))
    first_row(album)
    assert [each.title for each in second_row(album)] == [f"a cat {number}" for number in (1, 2, 3, 4)]


def test_the_strip_is_in_the_order_of_the_choice_and_all_its_images_are_there(result):
    album, metrics = read(result)
    cells = strip(album, metrics["choice"]).cells
    assert [cell.file.split("/")[1] for cell in cells] == ["baseline", "checkpoint-250", "finetuned"]
    assert [(cell.note, cell.is_chosen) for cell in cells[1:]] == [("loses <b>", False), ("", True)]
    assert strip(album, metrics["choice"]).title.startswith("Drawn in 8 steps, those above in ")
    sets = choice_images(album, metrics["choice"])
    assert {cell.file for each in sets for cell in each.cells} >= {entry["file"] for entry in album.candidates}
    assert [each.command for each in sets if each.title] == [None, "export checkpoint-250", "export finetuned"]
    assert [cell.is_again for cell in sets[2].cells] == [False, True]  # the photo, which no row showed here; the copy


def test_without_a_choice_the_strip_is_of_all_models(result):
    edit_json(result / "samples.json", candidates=None)
    album, _ = read(result)
    assert [cell.caption for cell in strip(album, None).cells] == ["the base", "step 250", "the result"]
    assert strip(album, None).title == ""  # in as many steps as the rest
    album.images = [entry for entry in album.images if entry["model"] != "checkpoint-250"]
    assert strip(album, None).cells == []


def test_the_rest_shows_what_nothing_else_does(result):
    album, metrics = read(result)
    first_row(album), second_row(album), strip(album, metrics["choice"]), choice_images(album, metrics["choice"])
    groups = rest(album)
    assert {cell.file for cell in album.shown.values()} == {*album.entries, *album.photos}
    assert [each.title for each in groups["Other things"]] == [f"a photo of a dog, seed {seed}" for seed in range(4)]
    places = [
        each.title for each in groups["The subject in other places"]
    ]  # the checkpoint's, beside the others again
    assert places == [f"a cat in place {number}" for number in range(4)]
    assert [cell.number for cell in album.shown.values()] == list(range(1, len(album.shown) + 1))


def test_a_pair_is_the_photo_and_the_picture(result):
    album, metrics = read(result)
    copy = metrics["copies"]["finetuned"][0]
    assert files(pairs(album, [copy, dict(copy, photo="gone.jpg")])) == [
        [copy["photo"], copy["file"].removesuffix(".png")]
    ]


def test_what_is_said_of_single_images(result):
    metrics = json.loads((result / "metrics.json").read_text())
    metrics["places"]["finetuned"] = [place := dict(metrics["others"]["finetuned"][2], kept=False, nearest="a cat")]
    metrics["others"]["finetuned"][0] |= dict(kept=False, nearest="a photo of a <cup>")
    metrics["models"]["baseline"]["blank_images"] = [blank := metrics["others"]["baseline"][0]["file"]]
    (result / "metrics.json").write_text(json.dumps(metrics))
    album, _ = read(result)
    assert album.image(metrics["others"]["finetuned"][0]["file"], "").note == "nearer to “a photo of a <cup>”"
    assert album.image(place["file"], "").note == "nearer to “a cat”"
    assert album.image(blank, "").note == "one colour"
    assert album.image(metrics["others"]["finetuned"][1]["file"], "").note == ""
