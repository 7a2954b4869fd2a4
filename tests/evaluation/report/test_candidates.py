"""Which of several models to use: what is taken from metrics.json, and what is made of the models without it."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from tests.helpers.results import write_result
from utils.evaluation.report.candidates import make_selection
from utils.evaluation.report.page import TEMPLATES


def given() -> dict:
    """metrics.json's candidates: three, of which the second is chosen."""
    entries = []
    for number, (x, y) in enumerate([(0.5, 0.66), (0.8, 0.64), (0.95, 0.5)], 1):
        entry = dict(name=f"c{number}", label=f"step {number}00", command=f"python -m utils.export c{number}", note="")
        entry |= dict(value=dict(x=x, y=y), interval=dict(x=[x - 0.02, x + 0.02], y=None))
        image = dict(file="images/baseline/000-x/seed-0.png", prompt="a cat", seed=0)
        entries.append(entry | dict(images=[image, dict(image, file="images/nowhere.png")]))
    axes = dict(x=dict(metric="clip_i", label="CLIP-I", baseline=0.1, photos=0.97))
    axes |= dict(y=dict(metric="clip_t_other", label="CLIP-T", baseline=0.67, photos=None), y_limit=0.62)
    return axes | dict(chosen="c2", is_good=True, sentence="Take step 200.", why="the nearest", entries=entries)


@pytest.fixture
def result(tmp_path, photos_dir):
    return write_result(tmp_path, photos_dir, prompt="a cat")


def select(result, candidates):
    samples, metrics = (json.loads((result / name).read_text()) for name in ("samples.json", "metrics.json"))
    return make_selection(
        result, samples, metrics | dict(candidates=candidates), {"images/baseline/000-x/seed-0.png": 7}
    )


def drawn(chart) -> ElementTree.Element:
    return ElementTree.fromstring(TEMPLATES.get_template("scatter.svg.jinja").render(chart=chart))


def test_the_chosen_one_is_marked_in_the_chart_and_in_the_strip(result):
    selection = select(result, given())
    assert [each.is_chosen for each in selection.candidates] == [False, True, False]
    assert [dot.text for dot in selection.chart.dots] == ["1", "3", "2"]  # the chosen one is drawn over the others
    svg = drawn(selection.chart)
    (ring,) = [circle for circle in svg.iter("circle") if circle.get("class") == "chosen"]
    assert (ring.get("cx"), ring.get("cy")) == (selection.chart.dots[-1].x, selection.chart.dots[-1].y)
    left, right = (next(dot for dot in selection.chart.dots if dot.text == text) for text in ("1", "3"))
    assert float(left.x) < float(right.x) and float(left.y) < float(right.y)  # further right is more, higher is more


def test_what_is_no_number_is_in_the_strip_alone(result):
    record = given()
    record["entries"][0]["value"]["y"] = None
    record["entries"][2]["value"]["x"] = float("nan")
    selection = select(result, record)
    assert [dot.text for dot in selection.chart.dots] == ["2"] and len(selection.candidates) == 3
    assert selection.candidates[0].values[1].text == "–"
    record["entries"][1]["value"]["x"] = None
    assert select(result, record).chart is None


def test_models_with_checkpoints_are_candidates_and_the_same_weights_are_one(result):
    selection = select(result, None)
    assert [each.label for each in selection.candidates] == ["step 250", "the result"]
    samples, metrics = (json.loads((result / name).read_text()) for name in ("samples.json", "metrics.json"))
    for name in ("checkpoint-250", "finetuned"):
        samples["models"][name]["sha256"] = dict(unet="1")
    (both,) = make_selection(result, samples, metrics, {}).candidates
    assert both.label == "the result" and both.is_chosen  # whichever of the two names was chosen
