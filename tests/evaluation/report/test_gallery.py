"""Where the images are on the page, what stands below them, and which are beside them."""

import json
from pathlib import Path

import pytest

from tests.helpers.results import write_result
from utils.evaluation.photos import load_photos
from utils.evaluation.report.gallery import Gallery, Score, make_gallery


def gallery(result, photos, is_scored=True) -> Gallery:
    samples = json.loads((result / "samples.json").read_text())
    return make_gallery(result, samples, load_photos(photos), is_scored)


@pytest.fixture(scope="module")
def result(tmp_path_factory, photos_dir) -> Path:
    """Never write into it."""
    return write_result(tmp_path_factory.mktemp("gallery"), photos_dir, prompt="a cat")


@pytest.fixture(scope="module")
def shown(result, photos_dir) -> Gallery:
    return gallery(result, photos_dir)


def test_every_image_has_a_number_and_knows_the_same_seed_of_the_rows_around_it(shown):
    cells = [cell for group in shown.groups for row in group.rows for cell in row.cells]
    assert [cell.number for cell in [*shown.photos, *cells]] == list(range(1, shown.last + 1))
    by_number = {cell.number: cell for cell in cells}
    baseline, checkpoint, finetuned = (row.cells[2] for row in shown.groups[0].rows)
    assert baseline.above is None and finetuned.below is None
    assert baseline.below == (checkpoint.number, "checkpoint-250") and checkpoint.below == (
        finetuned.number,
        "fine-tuned",
    )
    assert by_number[finetuned.above[0]] is checkpoint
    assert {cell.caption for cell in (baseline, checkpoint, finetuned)} == {"seed 2"}


def test_a_prompts_scores_are_means_and_a_visible_fall_is_marked(tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat")
    rows = (result / "metrics.csv").read_text().splitlines()
    values = {"baseline": ("0.1", "0.3"), "finetuned": ("0.5", "0.24"), "checkpoint-250": ("0.9", "0.9")}
    lines = [rows[0]]
    for row in rows[1:]:
        *start, clip_i, _, _ = row.split(",")
        lines.append(",".join([*start, clip_i, *values[start[1]]]))
    (result / "metrics.csv").write_text("\n".join(lines))
    scores = gallery(result, photos_dir).groups[0].scores
    assert scores == [Score("DINO", "0.10", "0.50", False), Score("CLIP-T", "0.30", "0.24", True)]
    assert gallery(result, photos_dir, is_scored=False).groups[0].scores == []
