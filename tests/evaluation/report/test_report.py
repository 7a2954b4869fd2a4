"""The report: escaping, size; and how it looks in a real browser."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from tests.helpers.results import report, write_result
from utils.evaluation.report.images import SIDES, WEBP_QUALITY, data_uri
from utils.evaluation.report.page import SCRIPT

CHROMIUM = Path("/usr/bin/chromium")
INJECTION = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)> \"' & {}"


# HTML


class Outline(HTMLParser):
    """All elements with their attributes; void elements apart, every one must be closed."""

    VOID = {"meta", "img", "br"}

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
    assert not names & {"iframe", "link", "object", "form", "base"}
    images = [attributes for name, attributes in outline.elements if name == "img"]
    assert len(images) > 3 * (2 * 4 + 4) + 3 * 4 + 4  # all, those of the choice, photos
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in images)
    assert not [key for _, attributes in outline.elements for key in attributes if key.startswith("on")]
    assert page.count("<script") == 1 and f"<script>{SCRIPT}</script>" in page  # ours, and nobody else's
    told = "needs &lt;b&gt;text", "loses &lt;b&gt;", "It &lt;i&gt;", "Not &lt;b&gt;", "&lt;script&gt;"
    assert all(text in page for text in told) and not re.search("<(b|i)>", page)
    (policy,) = [a["content"] for n, a in outline.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and policy.endswith(f"script-src 'sha256-{digest}'")


def test_a_file_name_cannot_become_style_or_a_link_elsewhere(tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat")
    samples = json.loads((result / "samples.json").read_text())
    name = "x');background:url(http:__evil); \" onclick=1.png"
    (result / samples["images"][0]["file"]).rename(result / name)
    samples["images"][0]["file"] = name
    (result / "samples.json").write_text(json.dumps(samples))
    views = [a["style"] for n, a in Outline(report(result)).elements if a.get("class") == "view" and "style" in a]
    (style,) = [style for style in views if "evil" in style]
    assert re.fullmatch(r"--file: url\('[\w.%-]+'\); --width: 384px; --ratio: 1\.0", style)


def test_a_name_that_is_no_utf8_is_spelled_out(tmp_path, photos_dir):
    assert "a photo of \\udcff" in report(write_result(tmp_path, photos_dir, prompt="a photo of \udcff"))


def test_links_lead_to_places_on_the_page_and_files_beside_it(tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat")
    outline = Outline(report(result))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    links = [attributes["href"] for name, attributes in outline.elements if name in ("a", "use")]
    inside = {link.removeprefix("#") for link in links if link.startswith("#")}
    assert len(ids) == len(set(ids)) and inside and inside <= set(ids)
    files = {link for link in links if not link.startswith("#")}
    assert len(files) == 3 * (2 * 4 + 4) + 3 * 4 and all((result / unquote(file)).is_file() for file in files)
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
    assert "evaluate.py --only score" in page and "Not scored yet" in page
    assert "your photo" not in page and "Which one to use" in page  # the strip is there without its sentence


def test_25_prompts_of_4_seeds_stay_below_4_megabytes(tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat", num_prompts=25, side=192, grain=2)
    page = report(result)
    assert len(page) < 4e6
    now = 4 + 2 + 4 * 2  # the first two rows
    assert page.count("<img") - page.count('loading="lazy"') == now
    assert [f"a cat {number}<" in page[: page.index("<h2>")] for number in range(1, 6)] == [True] * 4 + [False]


@pytest.mark.parametrize("most_bytes", [3_000, 20_000, 100_000])
@pytest.mark.parametrize("grain", [1, 32])
def test_an_image_is_as_large_as_its_bytes_allow(most_bytes, grain):
    noise = np.random.default_rng(0).integers(0, 256, (640 // grain, 480 // grain, 3), np.uint8)
    image = Image.fromarray(noise).resize((480, 640), Image.Resampling.BICUBIC)
    content = base64.b64decode(data_uri(image, most_bytes).partition(",")[2])
    side = max(Image.open(io.BytesIO(content)).size)
    assert side in SIDES and len(content) <= most_bytes
    for larger in [other for other in SIDES if other > side][-1:]:
        image.thumbnail((larger, larger), Image.Resampling.LANCZOS)
        image.save(file := io.BytesIO(), "WEBP", quality=WEBP_QUALITY)
        assert file.tell() > most_bytes


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
    page.set_default_timeout(60_000)
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: messages.append("dialog"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    return page, messages, requests


def test_it_opens_alone_and_shows_its_images(browser, page_file):
    page, messages, requests = open_page(browser, page_file, viewport=dict(width=1280, height=900))
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0 || image.loading === 'lazy')")
    page.evaluate("[...document.images].forEach(image => image.loading = 'eager')")
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
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


def test_unfolded_the_page_is_short_and_nothing_is_there_twice(browser, page_file):
    page, _, _ = open_page(browser, page_file, viewport=dict(width=1280, height=900))
    assert page.evaluate("document.documentElement.scrollHeight") <= 2500
    assert page.evaluate("document.body.innerText.split(/\\s+/).length") <= 700
    tops = "[...document.querySelectorAll('header .cell')].map(cell => cell.getBoundingClientRect().bottom)"
    bottoms = page.evaluate(tops)
    assert len(bottoms) == 4 + 2 + 4 * 2 and max(bottoms) <= 1000  # the injected prompt is three lines long
    visible = "[...document.querySelectorAll('p:not(.caption), h1, h2')].filter(p => p.checkVisibility())"
    lines = page.evaluate(f"{visible}.map(p => p.innerText)")
    assert len(lines) == len(set(lines))
    page.close()


def test_dark_is_dark(browser, page_file):
    means = {}
    for scheme in ("light", "dark"):
        page, _, _ = open_page(browser, page_file, viewport=dict(width=390, height=844), color_scheme=scheme)
        with Image.open(io.BytesIO(page.screenshot())) as shot:
            means[scheme] = np.asarray(shot.convert("L"))[:, :10].mean()  # beside all images
        page.close()
    assert means["light"] > 200 and means["dark"] < 80


def test_the_keyboard_reaches_links_frames_and_settings(browser, page_file):
    page, _, _ = open_page(browser, page_file)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"A.open", "SUMMARY."} <= set(reached)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.focus("#place-1")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    names = "[...document.querySelectorAll('[tabindex=\"0\"]')].every(element => element.getAttribute('aria-label'))"
    assert page.evaluate(names)
    page.close()


def shown_alone(page) -> str | None:
    """What the open image says of itself, if one is open."""
    return page.evaluate("document.querySelector('.cell:target .bar strong')?.textContent ?? null")


@pytest.mark.parametrize("with_scripts", [True, False])
def test_an_image_is_shown_alone_at_its_own_size(browser, page_file, with_scripts):
    options = dict(viewport=dict(width=1280, height=900), java_script_enabled=with_scripts)
    page, messages, _ = open_page(browser, page_file, **options)
    page.focus("#place-5")
    page.keyboard.press("Enter")
    page.wait_for_selector("#image-5 .bar", state="visible")
    box = page.locator("#image-5 .open").bounding_box()
    assert box["width"] == box["height"] == 384  # of 64 pixels: shown larger
    page.click("#image-5 [data-key=ArrowRight]")
    page.wait_for_selector("#image-6 .bar", state="visible")
    page.click("#image-6 [data-key=Escape]")
    page.wait_for_selector("#image-6 .bar", state="hidden")
    assert messages == []
    page.close()


def test_arrow_keys_go_through_all_images_and_escape_leaves(browser, page_file):
    page, _, _ = open_page(browser, page_file)
    page.click("#place-1")
    names = [shown_alone(page)]
    for _ in range(5):
        page.keyboard.press("ArrowRight")
        names.append(shown_alone(page))
    assert names[:4] == ["Your photo"] * 4 and names[4:] == ["the base, seed 0", "the result, seed 0"]
    page.keyboard.press("ArrowLeft")
    assert shown_alone(page) == "the base, seed 0"
    page.keyboard.press("Escape")
    assert shown_alone(page) is None
    assert page.evaluate("document.activeElement.id") == "place-5"  # one may go on from there
    page.close()


def turns_red(page, most_frames: int = 20) -> bool:
    """Whether the middle of the window is painted red within so many frames."""
    for _ in range(most_frames):
        with Image.open(io.BytesIO(page.screenshot())) as shot:
            if shot.convert("RGB").getpixel((640, 350)) == (255, 0, 0):
                return True
    return False


@pytest.mark.slow
def test_the_file_beside_the_page_lies_over_its_preview_and_need_not_be_there(browser, tmp_path, photos_dir):
    result = write_result(tmp_path, photos_dir, prompt="a cat", side=640, grain=64)
    report(result)
    first = json.loads((result / "samples.json").read_text())["images"][0]["file"]
    Image.new("RGB", (640, 640), (255, 0, 0)).save(result / first)
    alone = tmp_path / "mail" / "report.html"
    alone.parent.mkdir()
    alone.write_bytes((result / "report.html").read_bytes())
    for file, is_there in ((result / "report.html", True), (alone, False)):
        page, _, _ = open_page(browser, file, viewport=dict(width=1280, height=900))
        with page.expect_event("requestfinished" if is_there else "requestfailed"):
            page.click("#place-5")
        box = page.locator("#image-5 .open").bounding_box()
        assert (box["width"], box["height"]) == (640, 640)
        assert is_there == turns_red(page)
        page.close()


def test_what_is_folded_is_unfolded_to_be_shown(browser, page_file):
    page, _, _ = open_page(browser, page_file)
    last = page.evaluate("document.querySelectorAll('.cell[id]').length")
    page.goto(f"{page_file.as_uri()}#image-{last}")
    page.wait_for_selector(f"#image-{last} .bar", state="visible")
    assert shown_alone(page).startswith("the result")
    assert page.evaluate("document.querySelectorAll('[open]').length") == 1
    page.close()


OTHER_SCREENS = [(390, "light"), (1280, "dark")]


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(390, "dark"), (1280, "light"), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in OTHER_SCREENS)],
)
@pytest.mark.parametrize("place", ["", pytest.param("#image-9", marks=pytest.mark.slow)])
def test_axe_finds_nothing(browser, page_file, width, scheme, place):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme, bypass_csp=True)
    page.goto(page_file.as_uri() + place)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    found = axe.Axe().run(page).response["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
    page.close()


def test_printed_nothing_is_cut_or_folded(browser, page_file):
    page, _, _ = open_page(browser, page_file, viewport=dict(width=794, height=1123))
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
    folded = "[...document.querySelectorAll('details:not([open]) > :not(summary)')]"
    assert page.evaluate(f"{folded}.length > 0 && {folded}.every(part => part.checkVisibility())")
    assert page.evaluate("[...document.querySelectorAll('pre')].every(pre => pre.scrollWidth <= pre.clientWidth)")
    assert page.evaluate("getComputedStyle(document.querySelector('h2')).breakAfter") == "avoid"
    page.close()
