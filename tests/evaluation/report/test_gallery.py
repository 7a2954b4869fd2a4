"""What stands below the images of a prompt."""

import json

from tests.helpers.results import write_result
from utils.evaluation.photos import load_photos
from utils.evaluation.report.gallery import Gallery, Score, make_gallery


def gallery(result, photos, is_scored=True) -> Gallery:
    samples = json.loads((result / "samples.json").read_text())
    return make_gallery(result, samples, load_photos(photos), is_scored)


def test_a_prompts_scores_are_means(tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat")
    rows = (result / "metrics.csv").read_text().splitlines()
    values = {"baseline": ("0.1", "0.3"), "finetuned": ("0.5", "0.24"), "checkpoint-250": ("0.9", "0.9")}
    lines = [rows[0]]
    for row in rows[1:]:
        *start, clip_i, _, _ = row.split(",")
        lines.append(",".join([*start, clip_i, *reversed(values[start[1]])]))
    (result / "metrics.csv").write_text("\n".join(lines))
    scores = gallery(result, photos_dir).groups[0].scores
    assert scores == [Score("DINO", "0.10", "0.50"), Score("CLIP-T", "0.30", "0.24")]
    assert gallery(result, photos_dir, is_scored=False).groups[0].scores == []
