"""Photos of every kind: a picture or one line that names the file, never a traceback or a hang."""

import io
import json
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from tests.helpers.fuzzing import FUZZ, SECONDS_OF_FUZZ
from tests.helpers.photos import turned
from tests.helpers.pipelines import write_photos
from tests.helpers.script import EMBEDDED, ROOT, TRAIN, as_argv, dry_run, rows_of
from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.dataset import InstanceDataset
from utils.errors import UserError
from utils.models.loading import load_tokenizer
from utils.preflight.photos import blur_effect, describe_prompt, load_quick_tokenizer


def png(width: int, height: int, depth: int = 8, colour: int = 2, body: bytes = b"\0" * 100) -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def picture(mode: str, size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


# (what the file holds, whether it is a picture), beside what tests/test_dataset.py and tests/photos/ have
PHOTOS = {
    "bomb.png": (lambda: png(60_000, 60_000), False),
    "bomb of one row.png": (lambda: png(2_000_000_000, 1), False),
    "svg.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', False),
    "zero size.png": (lambda: png(0, 0), False),
    "ycc.jpg": (lambda: picture("YCbCr", (64, 64), "JPEG"), True),
    "1x1.png": (lambda: picture("RGB", (1, 1), "PNG"), True),
    "20000 wide.png": (lambda: picture("L", (20_000, 400), "PNG"), True),
    "new\nline.png": (lambda: picture("RGB", (64, 64), "PNG"), True),
    "cat 🐈 \x1b[31m.png": (lambda: picture("RGB", (64, 64), "PNG"), True),
    "-rf.png": (lambda: picture("RGB", (64, 64), "PNG"), True),
    "raw.jpg": (lambda: b"FUJIFILMCCD-RAW 0201".ljust(200, b"\0"), False),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_photos(tmp_path, tiny_pipeline_dir, capsys, name):
    make, good = PHOTOS[name]
    photos = write_photos(tmp_path / "photos", 1)
    (photos / name).write_bytes(make())
    code, out, err = dry_run(tiny_pipeline_dir, photos, tmp_path, capsys)
    assert code == (0 if good else 2) and err == ""
    rows = [line for line in out.splitlines() if line.startswith(("ok ", "note", "STOP"))]
    named = [row for row in rows if ascii(name)[1:-1].split("\\")[0] in row]
    assert named and any(row.startswith("STOP") for row in named) != good
    assert good or named[-1].endswith(" (docs/photos.md)")
    assert "\x1b" not in out and len(out.splitlines()) == len(rows) + 2


def test_100_megapixels_are_a_photo_and_pillows_remarks_do_not_reach_the_terminal(flags, tmp_path):
    photos = write_photos(tmp_path / "photos", 1)
    Image.new("L", (10_000, 10_000)).save(photos / "large.png")
    command = [sys.executable, TRAIN, *as_argv(flags | dict(instance_data_dir=photos, dry_run=True))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "") and "large.png: PNG 10000x10000" in result.stdout


def whole_photos() -> list[bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    found = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "TGA", "ICO", "JPEG2000", "HEIF", "AVIF", "JXL"):
        file = io.BytesIO()
        noise.save(file, kind, exif=turned(6).tobytes())
        found.append(file.getvalue())
    return found


@st.composite
def damaged(draw, whole: list[bytes]) -> bytes:
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(0, 8))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        content = content[: draw(st.integers(0, len(content)))]
    return bytes(content)


@pytest.mark.parametrize("num_examples", [200, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_fuzzed_photos(tmp_path, num_examples):
    end, outcomes = time.monotonic() + SECONDS_OF_FUZZ, dict(picture=0, refused=0)

    @settings(max_examples=num_examples, **FUZZ)
    @given(damaged(whole_photos()))
    def read(content: bytes) -> None:
        if time.monotonic() > end:
            return
        (tmp_path / "photo.jpg").write_bytes(content)
        try:
            dataset = InstanceDataset(tmp_path, 16)
        except UserError as error:
            assert "photo.jpg" in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert dataset.photos[0].pixels.dtype == np.uint8
            outcomes["picture"] += 1

    read()
    print(outcomes)
    assert min(outcomes.values()) > 20


def test_what_is_said_of_photos(tmp_path, tiny_pipeline_dir, capsys):
    photos = write_photos(tmp_path / "photos", 1)
    (photos / "again.jpg").write_bytes((photos / "photo-0.jpg").read_bytes())
    Image.open(photos / "photo-0.jpg").resize((60, 60)).save(photos / "nearly.png")
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 50, 4), np.uint8))
    noise.convert("RGB").save(photos / "turned.jpg", exif=turned(6))
    noise.save(photos / "see-through.png")
    noise.convert("CMYK").resize((16, 16)).save(photos / "small.jpg")
    (photos / "notes.txt").write_text("no photo")
    (photos / ".DS_Store").write_text("")
    code, out, _ = dry_run(tiny_pipeline_dir, photos, tmp_path, capsys)
    rows = rows_of(out)
    assert code == 0
    assert rows["photo-0.jpg: JPEG 48x48"] == "ok"
    assert rows["turned.jpg: JPEG 40x50, turned upright (EXIF 6), each crop shows 80%"] == "ok"
    assert rows["see-through.png: PNG 50x40, transparency on white, each crop shows 80%"] == "ok"
    assert rows["small.jpg: JPEG 16x16, CMYK made RGB, enlarged 2.0 times, it will look soft"] == "note"
    assert rows["the same file twice: again.jpg, photo-0.jpg: keep one of them"] == "note"
    assert rows["nearly alike: photo-0.jpg, nearly.png; keep one and add other views"] == "note"
    assert rows["notes.txt: not an image"] == "note" and rows[".DS_Store: hidden"] == "ok"
    assert not any("turned" in row and "nearly" in row for row in rows)


def rows(base, photos, tmp_path, capsys, *flags: str) -> dict[str, str]:
    code, out, err = dry_run(base, photos, tmp_path, capsys, *flags)
    assert (code, err) == (0, "")
    return rows_of(out)


def test_how_much_of_a_photo_a_crop_shows(tmp_path, tiny_pipeline_dir, capsys):
    photos = write_photos(tmp_path / "photos", 1)
    Image.open(photos / "photo-0.jpg").resize((64, 48)).save(photos / "wide.png")
    Image.open(photos / "photo-0.jpg").resize((48, 144)).save(photos / "tall.png")
    found = rows(tiny_pipeline_dir, photos, tmp_path, capsys)
    assert found["wide.png: PNG 64x48, each crop shows 76%"] == "ok"  # 42 x 32 at 32 px
    assert found["tall.png: PNG 48x144, each crop shows 33%"] == "note"
    found = rows(tiny_pipeline_dir, photos, tmp_path, capsys, "--center_crop")
    assert found["wide.png: PNG 64x48, the middle 76% is used"] == "ok"


def test_bars_are_said(tmp_path, tiny_pipeline_dir, capsys):
    photos = write_photos(tmp_path / "photos", 1)
    screenshot = Image.new("RGB", (48, 88))
    screenshot.paste(Image.open(photos / "photo-0.jpg"), (0, 25))
    screenshot.save(photos / "screenshot.png")
    (row,) = [row for row in rows(tiny_pipeline_dir, photos, tmp_path, capsys) if "screenshot" in row]
    assert "bars of one colour are learned too, --crop_bars cuts them off (top 25, bottom 15 pixels)" in row
    found = rows(tiny_pipeline_dir, photos, tmp_path, capsys, "--crop_bars")
    assert found["screenshot.png: PNG 48x88, bars cut off (top 25, bottom 15 pixels)"] == "ok"


def test_the_blur_effect():
    """Of a step, whose differences of 1 become nine of a ninth; of a slope, which stays; of nothing at all."""
    step = np.zeros((3, 40, 40), np.uint8)
    step[:, :, 20:] = 90
    slope = np.tile(np.arange(120, dtype=np.uint8), (3, 120, 1))
    assert blur_effect(step) == pytest.approx(1 / 9) and blur_effect(step.transpose(0, 2, 1)) == blur_effect(step)
    assert blur_effect(slope) > 0.95 and blur_effect(np.zeros((3, 20, 20), np.uint8)) == 0


def test_few_small_and_blurred_photos_are_notes(tmp_path, tiny_pipeline_dir, capsys):
    photos = write_photos(tmp_path / "photos", 1)
    cat = Image.open(ROOT / "instance/cat-3.jpg")
    cat.filter(ImageFilter.GaussianBlur(3)).save(photos / "blurred.png")
    cat.resize((250, 250)).save(photos / "small.png")
    found = rows(tiny_pipeline_dir, photos, tmp_path, capsys, "--resolution=512")
    assert found["blurred.png: PNG 512x512, blurred: use a sharper one"] == "note"
    assert found["small.png: PNG 250x250, enlarged 2.0 times, it will look soft"] == "note"
    assert found[f"3 in {photos}"] == "ok"
    cat.save(photos / "blurred.png")
    (photos / "small.png").unlink()
    found = rows(tiny_pipeline_dir, photos, tmp_path, capsys, "--resolution=512")
    assert found["blurred.png: PNG 512x512"] == "ok"
    assert found[f"2 in {photos}; with fewer than three the model learns the pictures, not the subject"] == "note"


def test_captions_are_said(tmp_path, tiny_pipeline_dir, capsys):
    photos = write_photos(tmp_path / "photos", 2)
    assert not any("of all" in row for row in rows(tiny_pipeline_dir, photos, tmp_path, capsys))
    (photos / "photo-0.txt").write_text("a cat asleep")
    found = rows(tiny_pipeline_dir, photos, tmp_path, capsys)
    assert found["of 1 of 2 photos; the others, such as photo-1.jpg, show 'a cat'"] == "note"
    (photos / "photo-1.txt").write_text("a cat")
    assert rows(tiny_pipeline_dir, photos, tmp_path, capsys)["of all 2 photos"] == "ok"


@pytest.mark.parametrize(("word", "is_named"), [("SKS cat", True), ("sks", True), ("cat", False), ("sksy cat", False)])
def test_captions_without_the_subject(tmp_path, capsys, word, is_named):
    photos = write_photos(tmp_path / "photos", 2)
    (photos / "photo-0.txt").write_text(f"a {word} on a sofa")
    found = rows(EMBEDDED, photos, tmp_path, capsys, "--resolution=64", "--instance_prompt=a photo of sks cat in snow")
    said = [row for row in found if row.startswith("1 of 2 photos have a caption without 'sks'")]
    assert len(said) == (not is_named)


def test_every_prompts_tokens(prior, capsys):
    long = "cat " * 80
    prior |= dict(
        validation_prompt=f"one {long}", validation_negative_prompt=f"two {long}", class_prompt=f"three {long}"
    )
    for scale, count in ((7.5, 3), (1, 2)):
        assert main([*as_argv(prior | dict(validation_guidance_scale=scale)), "--dry_run"]) == 0
        assert capsys.readouterr().out.count("tokens, but 77 are read") == count


PROMPTS = ["a photo of my cat.", "A  sks's DOG\n42!", "кот 🐈 naïve", "", "x" * 30, "<|endoftext|> don't", "a_b-c/d"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_quick_tokenizer_is_that_of_transformers(prompt, tiny_pipeline_dir):
    for folder in (EMBEDDED, tiny_pipeline_dir):
        expected = load_tokenizer(folder / "tokenizer")(prompt, add_special_tokens=False).input_ids
        assert load_quick_tokenizer(folder / "tokenizer").encode(prompt, add_special_tokens=False).ids == expected


def test_a_prompts_tokens_and_the_tail_of_a_long_one():
    tokenizer = load_quick_tokenizer(EMBEDDED / "tokenizer")
    assert describe_prompt("a photo of sks cat", tokenizer) == ("'a photo of sks cat': 7 of 77 tokens", "ok")
    words = "a photo of " + "cat " * 72
    assert describe_prompt(words, tokenizer)[1] == "ok"
    finding, verdict = describe_prompt(words + "in the rain", tokenizer)
    assert finding == "80 tokens, but 77 are read; cut off: 'in the rain'" and verdict == "note"


@pytest.mark.parametrize("where", ["instance_prompt", "class_prompt", "validation_prompt"])
def test_a_token_without_an_embedding_is_one_line_wherever_it_stands(prior, base, capsys, where):
    """A tokenizer of textual inversion beside the text encoder of before."""
    (base / "tokenizer/added_tokens.json").write_text(json.dumps({"<rex>": 514}))
    flags = prior | dict(pretrained_model_name_or_path=base, max_train_steps=1, num_class_images=1)
    assert run_main(main, as_argv(flags | {where: "a <rex>"})) == 2
    err = capsys.readouterr().err.splitlines()
    said = [line for line in err if line.startswith("error: ")]
    assert said == [line for line in err if "'a <rex>' has token number 514, but the text encoder knows 514" in line]
    assert len(said) == 1 and "Traceback" not in "".join(err)
