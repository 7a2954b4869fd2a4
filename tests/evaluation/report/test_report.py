"""The report: escaping, charts, contrast, size; and how it looks in a real browser."""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from utils.command_line import run_main
from utils.evaluation.report.charts import MAX_POINTS, Chart, Series, line_chart, smooth, thin, ticks
from utils.evaluation.report.images import data_uri, thumbnail_side
from utils.evaluation.report.page import REPORTED_METRICS, TEMPLATES
from utils.evaluation.samples import METRICS_FORMAT, SETTINGS_KEY, SamplingSettings, samples_id

CHROMIUM = Path("/usr/bin/chromium")
INJECTION = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)> \"' & {}"


def entry(value, interval=None, **more):
    return dict(value=value, interval=interval, **more)


def write_result(folder: Path, photos: Path, *, prompt: str, num_prompts: int = 1, side: int = 64) -> Path:
    """What generate and score leave, with three models, made without any model."""
    draws = np.random.default_rng(0)
    output = folder / "output"
    output.mkdir(parents=True)
    losses = [json.dumps(dict(step=step, loss=1 / step + draws.uniform(0, 0.2))) for step in range(1, 500)]
    (output / "metrics.jsonl").write_text("\n".join(losses))
    (output / "run.json").write_text(json.dumps(dict(command=f"torchrun '{prompt}'", result=dict(num_steps=500))))
    result = folder / "result"
    entries = []
    prompts = [(f"{prompt} {number}" if number else prompt, "subject") for number in range(num_prompts)]
    prompts.append(("a photo of a dog", "other"))
    for model in ("baseline", "finetuned", "checkpoint-250"):
        for number, (text, role) in enumerate(prompts):
            for seed in range(4):
                file = f"images/{model}/{number:03d}-x/seed-{seed}.png"
                (result / file).parent.mkdir(parents=True, exist_ok=True)
                noise = draws.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
                Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(result / file)
                sample = dict(file=file, model=model, role=role, prompt=text, seed=seed)
                entries.append(sample | {SETTINGS_KEY: str(seed)})
    models = dict(baseline=dict(path="model/sd", sha256=dict(unet="0")), finetuned=dict(path=str(output)))
    models["checkpoint-250"] = dict(path=str(output / "checkpoint-250"))
    names = ("num_images", "num_drift_images", "seed", *SamplingSettings._fields, "identifier", "class_name")
    samples = dict(written_by="evaluate.py", complete=True, files=[], samples_id=samples_id(entries), images=entries)
    samples |= dict(prompts=[dict(text=text, role=role) for text, role in prompts], models=models, device="cpu")
    samples |= dict(command=f"python evaluate.py --prompt '{prompt}'", versions=dict(torch="2"))
    samples |= dict.fromkeys(names, prompt) | dict(instance_data_dir=str(photos))
    (result / "samples.json").write_text(json.dumps(samples))
    (result / "metrics.json").write_text(json.dumps(measured(samples)))
    return result


def measured(samples: dict) -> dict:
    values = {}
    for place, model in enumerate(samples["models"]):
        value = entry(0.2 + 0.3 * place, [0.1 + 0.3 * place, 0.3 * place + 0.25])
        values[model] = {key: dict(value) for key, *_ in REPORTED_METRICS}
        values[model]["div_lpips"] = dict(value=None, reason="needs <b>lpips</b>")
        values[model]["copy_dino"].update(num_above_photos=3, num_images=8)
    photos = {name: entry(0.9) for name in ("real_clip", "real_dino", "nearest_clip", "nearest_dino", "clip_t_class")}
    encoder = dict(name="CLIP", folder="model/clip", sha256={"model.safetensors": "0" * 64}, transform=dict(crop=224))
    for model in values.values():
        model.update(clip_i_other=entry(0.1), dino_other=entry(0.1), blank_images=[])
    record = dict(written_by="evaluate.py", format=METRICS_FORMAT, samples_id=samples["samples_id"], models=values)
    record |= dict(
        encoders=dict(clip=encoder, dino=encoder), photos=dict(photos, files=[]), intervals=dict(confidence=0.95)
    )
    change = entry(-0.2, [-0.3, -0.1])
    names = ("clip_i", "dino", "clip_t", "clip_t_other", "clip_i_other", "dino_other", "pres_dino")
    record["changes"] = {model: dict.fromkeys(names, change) for model in list(values)[1:]}
    return record | dict(subject=dict(identifier="sks", class_name="dog"))


def report(result: Path) -> str:
    assert run_main(evaluate.main, ["--only", "report", "--output_dir", str(result)]) == 0
    return (result / "report.html").read_text(encoding="utf-8")


# HTML


class Outline(HTMLParser):
    """All elements with their attributes; void elements apart, every one must be closed."""

    VOID = {"meta", "img"}

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.open, self.errors = [], [], []
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.errors.append(name)


def test_a_prompt_cannot_become_part_of_the_page(tmp_path, photos_dir):
    page = report(write_result(tmp_path, photos_dir, prompt=INJECTION))
    outline = Outline(page)
    assert not outline.errors and not outline.open
    names = {name for name, _ in outline.elements}
    assert not names & {"script", "iframe", "link", "object", "form", "base"}
    images = [attributes for name, attributes in outline.elements if name == "img"]
    assert len(images) == 3 * 2 * 4 + 4
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in images)
    assert not [key for _, attributes in outline.elements for key in attributes if key.startswith("on")]
    assert "<script" not in page and "&lt;script&gt;" in page and "needs &lt;b&gt;lpips" in page
    (policy,) = [a["content"] for n, a in outline.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_a_name_that_is_no_utf8_is_spelled_out(tmp_path, photos_dir):
    assert "a photo of \\udcff" in report(write_result(tmp_path, photos_dir, prompt="a photo of \udcff"))


def test_it_is_found_from_any_folder(tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat")
    command = [
        sys.executable,
        os.path.relpath(evaluate.__file__, tmp_path),
        "--only",
        "report",
        "--output_dir",
        str(result),
    ]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | dict(PYTHONPATH=""))
    assert "</html>" in (result / "report.html").read_text(encoding="utf-8")


def test_links_lead_to_places_on_the_page(tmp_path, photos_dir):
    outline = Outline(report(write_result(tmp_path, photos_dir, prompt="a cat")))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    links = [attributes["href"] for name, attributes in outline.elements if name == "a"]
    assert len(ids) == len(set(ids)) and links and {link.lstrip("#") for link in links} <= set(ids)
    levels = [int(name[1]) for name, _ in outline.elements if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1 and levels.count(1) == 1


def test_what_is_missing_is_said(tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat")
    (result / "metrics.json").write_text("{")
    for path in (tmp_path / "output").iterdir():
        path.write_bytes(b"\xff")
    samples = json.loads((result / "samples.json").read_text())
    (result / "samples.json").write_text(json.dumps(samples | dict(instance_data_dir=None)))
    page = report(result)
    assert "have not been scored" in page and "No curve" in page and "Not scored yet" in page


def test_25_prompts_of_4_seeds_stay_below_10_megabytes(tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat", num_prompts=25, side=256)
    assert len(report(result)) < 10e6
    assert thumbnail_side(2 * 100 + 24) == 256
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8))
    assert len(data_uri(noise, thumbnail_side(224))) * 224 < 25e6  # pure noise, which no photo is
    assert [thumbnail_side(number) for number in (8, 120, 121, 5000)] == [384, 384, 256, 96]


def test_images_are_inlined_at_their_size():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8))
    kind, _, encoded = data_uri(noise, 384).partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), np.asarray(noise))
    kind, _, encoded = data_uri(noise.resize((480, 640)), 256).partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (192, 256)


# Charts


def as_svg(chart: Chart) -> str:
    return TEMPLATES.get_template("chart.svg.jinja").render(chart=chart)


def test_a_chart_is_sound_xml_within_its_frame():
    points = [(step, math.sin(step)) for step in range(1, 30)]
    chart = line_chart("Loss <1>", [Series(points, "raw"), Series([(1, 0.5), (29, 1.0)], "smooth", [(29, 0.2, 1.5)])])
    svg = ElementTree.fromstring(as_svg(chart))
    assert svg.get("role") == "img" and "Loss <1>: from 0.5 at step 1 to 1 at 29" == svg.get("aria-label")
    width, height = map(float, svg.get("viewBox").split()[2:])
    for line in svg.iter("polyline"):
        pairs = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in pairs)
    high = next(element for element in svg.iter("polyline") if "raw" in element.get("class"))
    ys = [float(pair.split(",")[1]) for pair in high.get("points").split()]
    assert ys[13] == min(ys) and ys[10] == max(ys)  # sin 14 is the largest value, sin 11 the smallest: up is more


def test_a_chart_of_nothing_is_nothing():
    assert line_chart("Loss", [Series([], "raw")]) is None
    assert line_chart("Loss", [Series([(1, math.nan), (2, "inf")], "raw")]) is None
    assert "polyline" in as_svg(line_chart("Loss", [Series([(1, 0.5)], "raw")]))
    assert "polyline" in as_svg(line_chart("Loss", [Series([(1, 0.5), (2, 0.5)], "raw")]))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.03, 0.95), (-2, 7), (1e-6, 2e-6), (5, 5), (0, 0), (-3, -3), (1, 2000)]
)
def test_ticks_are_few_round_and_enclose(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and found == sorted(set(found))
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9


def test_long_curves_are_thinned_and_smoothed():
    assert len(thin([(step, 1.0) for step in range(100_000)])) <= MAX_POINTS
    assert [y for _, y in smooth([(1, 2.0), (2, 2.0)])] == pytest.approx([2.0, 2.0])
    weights = [0.95**2, 0.95, 1]
    expected = sum(w * v for w, v in zip(weights, (1, 5, 3), strict=True)) / sum(weights)
    assert smooth([(1, 1), (2, 5), (3, 3)])[-1][1] == pytest.approx(expected)


# Colours

TEXT_ON_GROUND = (
    ("ink", "ground"),
    ("ink", "raised"),
    ("muted", "ground"),
    ("muted", "raised"),
    ("accent", "ground"),
    ("accent", "raised"),
    ("warn-ink", "warn-ground"),
    ("ink", "warn-ground"),
    ("ink", "note-ground"),
    ("muted", "note-ground"),
    ("good-ink", "good-ground"),
    ("ink", "good-ground"),
)


def colour_schemes() -> list[dict[str, str]]:
    """The light and the dark colours of style.css."""
    css = TEMPLATES.get_template("style.css").render()
    return [dict(re.findall(r"--([a-z-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]


LIGHT, DARK = colour_schemes()


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), TEXT_ON_GROUND)
def test_text_has_contrast(colours, text, ground):
    low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_both_colour_schemes_have_the_same_names():
    assert set(LIGHT) == set(DARK) and len(LIGHT) == 12


# A real browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (Debian: apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, photos_dir) -> Path:
    result = write_result(tmp_path_factory.mktemp("browser"), photos_dir, prompt=f"a cat {INJECTION}", num_prompts=2)
    report(result)
    return result / "report.html"


def open_page(browser, file: Path, **options):
    """The opened page, its console messages and errors, and the requests that it made."""
    page, messages, requests = browser.new_page(**options), [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: messages.append("dialog"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    return page, messages, requests


def test_it_opens_alone_and_shows_its_images(browser, page_file):
    page, messages, requests = open_page(browser, page_file, viewport=dict(width=1280, height=900))
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") == 3 * 3 * 4 + 4
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.evaluate("[...document.querySelectorAll('svg polyline')].every(line => line.getBBox().width > 0)")
    page.close()


@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_only_frames_scroll_sideways(browser, page_file, width):
    page, _, _ = open_page(browser, page_file, viewport=dict(width=width, height=844))
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    frames = "[...document.querySelectorAll('.scroller')]"
    assert page.evaluate(f"{frames}.every(frame => frame.getBoundingClientRect().right <= innerWidth)")
    if width <= 390:
        assert page.evaluate(f"{frames}.some(frame => frame.scrollWidth > frame.clientWidth)")
    page.close()


def test_dark_is_dark(browser, page_file):
    means = {}
    for scheme in ("light", "dark"):
        page, _, _ = open_page(browser, page_file, viewport=dict(width=390, height=844), color_scheme=scheme)
        with Image.open(io.BytesIO(page.screenshot())) as shot:
            means[scheme] = np.asarray(shot.convert("L")).mean()
        page.close()
    assert means["light"] > 200 and means["dark"] < 80


def test_the_keyboard_reaches_links_frames_and_settings(browser, page_file):
    page, _, _ = open_page(browser, page_file)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"A.", "DIV.scroller", "SUMMARY."} <= set(reached)
    page.focus("nav a")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    names = "[...document.querySelectorAll('[tabindex]')].every(element => element.getAttribute('aria-label'))"
    assert page.evaluate(names)
    page.close()
