"""Transforms against known pixels, features against the models called by hand."""

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from tests.helpers.encoders import write_clip, write_dino, write_safety_checker
from tests.helpers.script import ROOT
from utils.errors import UserError
from utils.evaluation import encoders
from utils.evaluation.encoders import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Transform

CPU = torch.device("cpu")
PLAIN = dict(mean=(0, 0, 0), std=(1, 1, 1))


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# Transforms


def test_one_pixel_by_hand():
    image = Image.new("RGB", (224, 224), (255, 0, 51))
    clip = Transform(224, 224, CLIP_MEAN, CLIP_STD)(image)
    dino = Transform(256, 224, IMAGENET_MEAN, IMAGENET_STD)(image)
    assert clip.shape == dino.shape == (3, 224, 224) and clip.dtype == np.float32
    assert clip[:, 0, 0] == pytest.approx([1.9303361, -1.7520971, -0.7549964], abs=1e-5)
    assert dino[:, 100, 7] == pytest.approx([2.2489083, -2.0357142, -0.9155555], abs=1e-5)


def test_the_middle_is_cropped():
    image = Image.new("RGB", (20, 8))
    for column in range(20):
        image.paste((column, 0, 0), (column, 0, column + 1, 8))
    cropped = Transform(8, 8, **PLAIN)(image)
    assert np.round(cropped[0, 0] * 255).astype(int).tolist() == [6, 7, 8, 9, 10, 11, 12, 13]
    tall = Transform(8, 8, **PLAIN)(image.rotate(90, expand=True))
    assert np.round(tall[0, :, 0] * 255).astype(int).tolist() == [13, 12, 11, 10, 9, 8, 7, 6]


def cubic(distance: float) -> float:
    """Keys's cubic kernel with a = -1/2."""
    distance = abs(distance)
    if distance < 1:
        return (1.5 * distance - 2.5) * distance * distance + 1
    return ((-0.5 * distance + 2.5) * distance - 4) * distance + 2 if distance < 2 else 0.0


def shrink_line(line: list[float], size: int) -> list[float]:
    """Bicubic with antialiasing: the kernel is stretched by the factor of reduction."""
    scale = len(line) / size
    stretch = max(scale, 1.0)
    result = []
    for target in range(size):
        centre = (target + 0.5) * scale
        weights = [cubic((source + 0.5 - centre) / stretch) for source in range(len(line))]
        value = sum(w * v for w, v in zip(weights, line, strict=True)) / sum(weights)
        result.append(min(255.0, max(0.0, float(math.floor(value + 0.5)))))
    return result


@pytest.mark.parametrize("size", [(30, 24), (9, 6)])
def test_resizing_is_antialiased_bicubic(size):
    image = noise_image(*size)
    resize = 12
    width, height = size[0] * resize // min(size), size[1] * resize // min(size)
    channel = np.asarray(image)[..., 1].astype(float)
    across = np.array([shrink_line(row, width) for row in channel.tolist()])
    expected = np.array([shrink_line(column, height) for column in across.T.tolist()]).T
    left = (width - 12) // 2
    found = Transform(resize, 12, **PLAIN)(image)[1] * 255
    assert np.abs(found - expected[:, left : left + 12]).max() <= 1.001


# Models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return dict(
        clip=write_clip(root / "clip"), dino=write_dino(root / "dino"), pipeline=write_safety_checker(root / "sd")
    )


def assert_unit(rows: np.ndarray) -> None:
    assert rows.dtype == np.float64
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)


def assert_same_direction(rows: np.ndarray, features: torch.Tensor) -> None:
    assert_unit(rows)
    assert np.allclose(rows, torch.nn.functional.normalize(features.double(), dim=1).numpy(), atol=1e-6)


IMAGES = [noise_image(40, 32, seed) for seed in range(20)]  # more than one batch


@torch.inference_mode()
def test_clip_is_both_towers_with_their_projections(folders):
    encoder = encoders.load_clip(folders["clip"], CPU)
    assert encoder.transform == Transform(32, 32, CLIP_MEAN, CLIP_STD)
    model, pixels = CLIPModel.from_pretrained(folders["clip"]).eval(), np.stack([*map(encoder.transform, IMAGES)])
    pooled = model.vision_model(pixel_values=torch.from_numpy(pixels)).pooler_output
    assert_same_direction(encoder.images(IMAGES), model.visual_projection(pooled))
    texts = ["a dog", "a longer text of a cat"]
    tokenizer = CLIPTokenizer.from_pretrained(folders["clip"])
    for text, row in zip(texts, encoder.texts(texts), strict=True):  # one at a time, without padding
        tokens = tokenizer(text, return_tensors="pt")
        assert_same_direction(row[None], model.text_projection(model.text_model(**tokens).pooler_output))


@torch.inference_mode()
def test_dino_is_the_class_token(folders):
    encoder = encoders.load_dino(folders["dino"], CPU)
    assert encoder.transform == Transform(37, 32, IMAGENET_MEAN, IMAGENET_STD)  # 256 / 224 of 32
    model = ViTModel.from_pretrained(folders["dino"], add_pooling_layer=False).eval()
    pixels = torch.from_numpy(np.stack([*map(encoder.transform, IMAGES)]))
    assert_same_direction(encoder.images(IMAGES), model(pixel_values=pixels).last_hidden_state[:, 0])
    assert encoder.text_features is None


@torch.inference_mode()
def test_the_safety_checkers_image_tower(folders):
    encoder = encoders.load_safety_checker(folders["pipeline"], CPU)
    assert encoder.transform == Transform(32, 32, CLIP_MEAN, CLIP_STD)
    checker = StableDiffusionSafetyChecker.from_pretrained(folders["pipeline"] / "safety_checker").eval()
    pixels = torch.from_numpy(np.stack([*map(encoder.transform, IMAGES)]))
    assert_same_direction(encoder.images(IMAGES), checker.visual_projection(checker.vision_model(pixels)[1]))
    assert encoder.text_features is None


def test_the_embedded_clip_and_safety_checker_hold_the_same_image_tower():
    model = ROOT / "model"
    clip = encoders.load_clip(model / "tiny-clip", CPU)
    checker = encoders.load_safety_checker(model / "tiny-stable-diffusion", CPU)
    assert np.allclose(clip.images(IMAGES[:2]), checker.images(IMAGES[:2]), atol=1e-6)


def test_path_hash_and_transform_are_recorded(folders):
    described = encoders.load_clip(folders["clip"], CPU).description()
    weights = (folders["clip"] / "model.safetensors").read_bytes()
    assert described["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert described["folder"] == str(folders["clip"])
    assert described["transform"]["centre_crop"] == 32
    json.dumps(described)


def test_files_that_an_index_names_are_hashed_wherever_they_lie(tmp_path):
    """tiny-clip's text tower is the file of the pipeline beside it."""
    text_tower, found = "../tiny-stable-diffusion/text_encoder/model.safetensors", []
    for flipped in (0, 1):
        folder = tmp_path / str(flipped) / "tiny-clip"
        for name in ("tiny-clip", "tiny-stable-diffusion"):
            shutil.copytree(ROOT / "model" / name, folder.parent / name)
        data = bytearray((folder / text_tower).read_bytes())
        data[-1] ^= flipped
        (folder / text_tower).write_bytes(data)
        found.append(encoders.load_clip(folder, CPU).description()["sha256"])
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2
    assert [name for name in found[0] if found[0][name] != found[1][name]] == [text_tower]


def test_an_unfit_folder_is_named(folders, tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        encoders.load_clip(tmp_path, CPU)
    with pytest.raises(UserError, match="is a vit model"):
        encoders.load_clip(folders["dino"], CPU)
    with pytest.raises(UserError, match="is a clip model"):
        encoders.load_dino(folders["clip"], CPU)


def test_lacking_weights_are_not_filled_in_at_random(folders, tmp_path):
    folder = shutil.copytree(folders["dino"], tmp_path / "dino")
    weights = load_file(folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="layernorm.weight"):
        encoders.load_dino(folder, CPU)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be loaded"):
        encoders.load_dino(folder, CPU)


def test_many_images_are_encoded_behind_a_progress_bar(tmp_path, capfd):
    dino = encoders.load_dino(write_dino(tmp_path), CPU)
    capfd.readouterr()
    few = dino.images([noise_image(32, 32, seed) for seed in range(encoders.BATCH_SIZE)])
    assert capfd.readouterr().err == ""
    many = dino.images([noise_image(32, 32, seed) for seed in range(encoders.BATCH_SIZE + 4)])
    said = capfd.readouterr().err
    assert f"scoring, {dino.name}" in said and "20/20 [" in said and "image/s]" in said
    assert many.shape == (20, 16) and many[:16] == pytest.approx(few, abs=1e-6)
