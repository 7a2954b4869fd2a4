"""Bad photos and model folders: a picture or one line naming the file, never a traceback, a hang or an import."""

import copy
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import write_photos
from tests.helpers.script import ROOT, dry_run
from utils.dataset import InstanceDataset
from utils.errors import UserError
from utils.preflight import check_base_model

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def png(width: int, height: int, depth: int = 8, colour: int = 2, body: bytes = b"\0" * 100) -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def picture(mode: str, size: tuple[int, int], kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


FRAMES = dict(save_all=True, append_images=[Image.new("RGB", (32, 32), (9, 9, 9))])
# (what the file holds, whether it is a picture)
PHOTOS = {
    "bomb.png": (lambda: png(60_000, 60_000), False),
    "bomb of one row.png": (lambda: png(2_000_000_000, 1), False),
    "cut.png": (lambda: cut(picture("RGB", (64, 64), "PNG")), False),
    "cut.jpg": (lambda: cut(picture("RGB", (64, 64), "JPEG")), False),
    "cut.webp": (lambda: cut(picture("RGB", (64, 64), "WEBP")), False),
    "cut.bmp": (lambda: cut(picture("RGB", (64, 64), "BMP")), False),
    "cut.tiff": (lambda: cut(picture("RGB", (64, 64), "TIFF")), False),
    "cut.gif": (lambda: picture("RGB", (64, 64), "GIF")[:20], False),
    "text.jpg": (lambda: b"no photo at all", False),
    "empty.png": (lambda: b"", False),
    "html.webp": (lambda: b"<!DOCTYPE html><html>404</html>", False),
    "svg.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', False),
    "zip.jpg": (lambda: b"PK\x03\x04" + b"\0" * 60, False),
    "zero size.png": (lambda: png(0, 0), False),
    "of another name.jpg": (lambda: picture("RGB", (64, 64), "PNG"), True),
    "16 bit.png": (lambda: picture("I;16", (64, 64), "PNG"), True),
    "32 bit.tiff": (lambda: picture("I", (64, 64), "TIFF"), True),
    "float.tiff": (lambda: picture("F", (64, 64), "TIFF"), True),
    "cmyk.jpg": (lambda: picture("CMYK", (64, 64), "JPEG"), True),
    "palette.png": (lambda: picture("P", (64, 64), "PNG"), True),
    "black and white.png": (lambda: picture("1", (64, 64), "PNG"), True),
    "lab.tiff": (lambda: picture("LAB", (64, 64), "TIFF"), True),
    "ycc.jpg": (lambda: picture("YCbCr", (64, 64), "JPEG"), True),
    "animated.gif": (lambda: picture("RGB", (32, 32), "GIF", **FRAMES), True),
    "animated.webp": (lambda: picture("RGB", (32, 32), "WEBP", **FRAMES), True),
    "animated.png": (lambda: picture("RGB", (32, 32), "PNG", **FRAMES), True),
    "1x1.png": (lambda: picture("RGB", (1, 1), "PNG"), True),
    "20000 wide.png": (lambda: picture("L", (20_000, 400), "PNG"), True),
    "10000 square.jpg": (lambda: picture("L", (10_000, 10_000), "JPEG"), True),
    "new\nline.png": (lambda: picture("RGB", (64, 64), "PNG"), True),
    "cat 🐈 \x1b[31m.png": (lambda: picture("RGB", (64, 64), "PNG"), True),
    "-rf.png": (lambda: picture("RGB", (64, 64), "PNG"), True),
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
    assert "\x1b" not in out and len(out.splitlines()) == len(rows) + 2


def test_links_in_circles_and_fifos_are_skipped(tmp_path, tiny_pipeline_dir, capsys):
    photos = write_photos(tmp_path / "photos", 1)
    (photos / "loop.jpg").symlink_to("loop.jpg")
    (photos / "up").symlink_to("..")
    os.mkfifo(photos / "fifo.png")
    code, out, _ = dry_run(tiny_pipeline_dir, photos, tmp_path, capsys)
    assert code == 0 and "loop.jpg: not a regular file" in out and "fifo.png: not a regular file" in out


def test_a_folder_that_is_a_circle(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match="there is no folder"):
        InstanceDataset(tmp_path / "circle", 16)
    with pytest.raises(UserError, match="there is no folder"):
        check_base_model(tmp_path / "circle")


@pytest.fixture
def base(tmp_path, tiny_pipeline_dir) -> Path:
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "base")


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_tensor(base: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(base / UNET_FILE)
    save_file(tensors | {name: value}, base / UNET_FILE, {"format": "pt"})


def change_header(base: Path, change) -> None:
    content = (base / UNET_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    (base / UNET_FILE).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def swap_sizes(header: dict) -> None:
    header["conv_in.weight"]["shape"] = [1, 1]


def overlap(header: dict) -> None:
    one, other = list(header)[1:3]
    header[one]["data_offsets"] = header[other]["data_offsets"]


MODELS = {
    "channels a text": (lambda b: edit(b / "unet/config.json", in_channels="4"), "in_channels is '4', not a sensible"),
    "channels null": (lambda b: edit(b / "vae/config.json", latent_channels=None), "latent_channels is None"),
    "channels endless": (lambda b: edit(b / "unet/config.json", in_channels=10**12), "is 1000000000000, not a sens"),
    "blocks a text": (lambda b: edit(b / "vae/config.json", block_out_channels="many"), "block_out_channels is None"),
    "blocks none": (lambda b: edit(b / "vae/config.json", block_out_channels=[]), "has no or too many numbers"),
    "blocks true": (lambda b: edit(b / "unet/config.json", block_out_channels=[True]), "block_out_channels is True"),
    "width a list": (lambda b: edit(b / "text_encoder/config.json", hidden_size=[16]), r"hidden_size is \[16\]"),
    "nested": (lambda b: (b / "unet/config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "foreign class": (
        lambda b: edit(b / "model_index.json", evil=["os", "system"]),
        r"evil is \['os', 'system'\], which is not a class of diffusers or transformers; nothing is ever imported",
    ),
    "foreign unet": (lambda b: edit(b / "model_index.json", unet=["evil", "UNet2DConditionModel"]), "unet is .'evil'"),
    "class of one": (lambda b: edit(b / "model_index.json", vae=["diffusers"]), r"vae is \['diffusers'\]"),
    "class a number": (lambda b: edit(b / "model_index.json", unet=7), "unet is 7, but"),
    "wrong shape": (
        lambda b: change_tensor(b, "conv_in.weight", torch.zeros(16, 9, 3, 3)),
        r"conv_in.weight has shape \[16, 9, 3, 3\], but unet/config.json asks for \[16, 4, 3, 3\]",
    ),
    "lying shape": (lambda b: change_header(b, swap_sizes), "its shape asks for 4"),
    "overlapping": (lambda b: change_header(b, overlap), "(contradicts itself|its shape asks for)"),
    "header of the file's length": (
        lambda b: (b / UNET_FILE).write_bytes(b"\xff" * 8 + (b / UNET_FILE).read_bytes()[8:]),
        "its header is longer than the file",
    ),
    "negative shape": (lambda b: change_header(b, lambda h: h["conv_in.bias"].update(shape=[-16])), "contradicts"),
    "a fifo for weights": (lambda b: ((b / UNET_FILE).unlink(), os.mkfifo(b / UNET_FILE)), "is not a regular file"),
    "a folder for weights": (lambda b: ((b / UNET_FILE).unlink(), (b / UNET_FILE).mkdir()), "is not a regular file"),
    "a fifo for a configuration": (
        lambda b: ((b / "unet/config.json").unlink(), os.mkfifo(b / "unet/config.json")),
        "lacks unet/config.json",
    ),
    "vocabulary no JSON": (lambda b: (b / "tokenizer/vocab.json").write_text("{"), "holds no CLIP tokenizer"),
    "vocabulary of lists": (lambda b: (b / "tokenizer/vocab.json").write_text('{"a": []}'), "holds no CLIP tokenizer"),
    "merges of nothing": (lambda b: (b / "tokenizer/merges.txt").write_text("#version\nqq zz\n"), "no CLIP tokenizer"),
    "a schedule of text": (lambda b: (b / "scheduler/scheduler_config.json").write_text('"x"'), "JSON object"),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_folders(tmp_path, base, photos_dir, capsys, case):
    import re

    spoil, message = MODELS[case]
    spoil(base)
    modules = set(sys.modules)
    code, out, err = dry_run(base, photos_dir, tmp_path, capsys)
    assert code == 2 and err == "" and "NOT READY" in out
    assert re.search(message, out), out
    assert not {name for name in set(sys.modules) - modules if name.split(".")[0] == "evil"}
    assert not (tmp_path / "output").exists()


def test_pickles_are_refused_where_torch_cannot_read_them_safely(base, monkeypatch):
    (base / UNET_FILE).unlink()
    torch.save({"conv_in.weight": torch.zeros(16, 4, 3, 3)}, base / "unet/diffusion_pytorch_model.bin")
    check_base_model(base)
    monkeypatch.setattr("utils.model_files.torch_version", lambda: (2, 5))
    with pytest.raises(UserError, match=r"is a pickle, .*CVE-2025-32434\); install torch 2.6 or newer, or convert"):
        check_base_model(base)


def test_a_pickle_that_runs_code_runs_none(tmp_path, base, photos_dir, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    (base / UNET_FILE).unlink()
    torch.save({"conv_in.weight": Evil()}, base / "unet/diffusion_pytorch_model.bin")
    code, out, _ = dry_run(base, photos_dir, tmp_path, capsys)
    assert code == 2 and "is not a file of weights" in out and not (tmp_path / "harmed").exists()


def test_pillows_remarks_do_not_reach_the_terminal(tmp_path, tiny_pipeline_dir):
    photos = write_photos(tmp_path / "photos", 1)
    Image.new("L", (10_000, 10_000)).save(photos / "large.png")
    argv = ["--pretrained_model_name_or_path", tiny_pipeline_dir, "--instance_data_dir", photos, "--dry_run"]
    argv += ["--instance_prompt", "a cat", "--output_dir", tmp_path / "output", "--resolution", 32]
    command = [sys.executable, "train_dreambooth_colossalai.py", *map(str, argv)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "") and "very large (100 megapixels)" in result.stdout


FUZZ = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
SECONDS_OF_FUZZ = 60


def whole_photos() -> list[bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    found = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "TGA", "ICO", "JPEG2000"):
        file = io.BytesIO()
        noise.save(file, kind)
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fuzzed_photos(tmp_path):
    end, outcomes = time.monotonic() + SECONDS_OF_FUZZ, dict(picture=0, refused=0)

    @settings(max_examples=20_000, **FUZZ)
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
    assert min(outcomes.values()) > 100


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
def test_fuzzed_model_folders(tmp_path, base):
    end, outcomes = time.monotonic() + SECONDS_OF_FUZZ, dict(passed=0, refused=0)
    names = ["model_index.json", *(f"{p}/config.json" for p in ("unet", "vae", "text_encoder"))]
    whole = {name: json.loads((base / name).read_text()) for name in [*names, "scheduler/scheduler_config.json"]}
    weights = (base / UNET_FILE).read_bytes()
    header_bytes = 8 + int.from_bytes(weights[:8], "little")

    @settings(max_examples=20_000, **FUZZ)
    @given(st.sampled_from(sorted(whole)), st.integers(0, 100), JSON_VALUES, st.integers(0, 2**32), st.booleans())
    def read(name: str, place: int, value, seed: int, in_weights: bool) -> None:
        if time.monotonic() > end:
            return
        changed, spoilt = copy.deepcopy(whole[name]), bytearray(weights)
        chance = random.Random(seed)
        if in_weights:
            for _ in range(chance.randrange(1, 5)):
                spoilt[chance.randrange(header_bytes)] = chance.randrange(256)
        else:
            changed[sorted(changed)[place % len(changed)]] = value
        (base / name).write_text(json.dumps(changed))
        (base / UNET_FILE).write_bytes(spoilt)
        try:
            check_base_model(base)
            outcomes["passed"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        finally:
            (base / name).write_text(json.dumps(whole[name]))

    read()
    print(outcomes)
    assert min(outcomes.values()) > 100
