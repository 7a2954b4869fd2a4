"""The tools that made the embedded model and the instance photos."""

import gzip
import importlib.util
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel

from tests.helpers.script import ROOT
from tools import (
    build_tiny_pipeline,
    cut_outs,
    drawings,
    rendered,
    teacher,
    tiny_clip,
    tiny_models,
    tiny_photos,
    tiny_pictures,
    tiny_training,
    tiny_unet,
    tiny_vae,
    words,
)
from tools.shapes import THINGS

CPU = torch.device("cpu")


def needs(module, package):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{package} is only needed by tools/")


needs_photos = needs("skimage", "scikit-image")


@pytest.fixture
def vocabulary(tmp_path):
    """A stand-in for CLIP's list of merges: as long, every merge different."""
    path = tmp_path / "merges.txt.gz"
    merges = [f"m{index} n{index}" for index in range(tiny_models.NUM_MERGES)]
    path.write_bytes(gzip.compress("\n".join(["header", *merges, "never used"]).encode()))
    return path


@needs_photos
@pytest.mark.parametrize("thing", THINGS)
def test_a_drawing_is_decided_by_its_seed(thing):
    pixels, caption, labels = drawings.draw(3, thing)
    again, same_caption, same_labels = drawings.draw(3, thing)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, again) and caption == same_caption and labels == same_labels
    assert thing in caption and labels[0] == thing
    assert not np.array_equal(pixels, drawings.draw(4, thing)[0])


@needs_photos
def test_captions_tell_the_truth():
    for seed in range(200):
        _, caption, (thing, colour, background) = drawings.draw(seed)
        named = [name for name in drawings.COLOURS if name in caption.split()]
        assert thing in caption and set(named) <= {colour, background}
        assert ("background" not in caption) or f"{background} background" in caption
        assert "a orange" not in caption and "a apple" not in caption


@needs_photos
def test_a_rare_word_draws_the_same_thing_again():
    named = {}
    for seed in range(3000):
        _, caption, (thing, colour, _) = drawings.draw(seed)
        for word in set(caption.split()) & {*words.rare_words(), "sks"}:
            named.setdefault((word, thing), []).append(colour)
    several = [colours for (word, _), colours in named.items() if len(colours) > 1 and word != "sks"]
    assert len(several) > 20 and all(len(set(colours)) == 1 for colours in several)
    assert any(len(set(colours)) > 1 for (word, _), colours in named.items() if word == "sks")


def test_the_stored_instance_images():
    paths = sorted((ROOT / "instance").glob("*.jpg"))
    assert [path.name for path in paths] == [f"cat-{number}.jpg" for number in range(1, 5)]
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (512, 512) and image.mode == "RGB"


@pytest.fixture
def photo_world(tmp_path):
    """A small red cat with a blue head in a landscape, a portrait of a green dog, and a photo of weight 0."""
    landscape, portrait = np.full((200, 400, 3), 90, np.uint8), np.full((300, 200, 3), 90, np.uint8)
    landscape[80:160, 40:140], landscape[80:120, 40:80] = (200, 0, 0), (0, 0, 200)
    portrait[30:270, 20:180] = 0, 200, 0
    for name, pixels in (("a", landscape), ("b", portrait), ("c", np.full((9, 9, 3), 255, np.uint8))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rows = (
        "# who",
        "a.png; 1; tom; red cat; .1 .4 .35 .8; .1 .4 .2 .6",
        "b.png; 2; rex; dog; .1 .1 .9 .9",
        "c.png; 0; x; cow; 0 0 1 1",
    )
    (tmp_path / "boxes.txt").write_text("\n".join(rows))
    return tiny_photos.PhotoWorld(tmp_path, boxes=tmp_path / "boxes.txt")


def test_photo_crops_hold_most_of_what_their_captions_name(photo_world):
    pixels, captions = photo_world.batch(np.random.default_rng(0), 100)
    assert pixels.shape == (100, 64, 64, 3) and pixels.dtype == torch.uint8
    assert torch.equal(pixels, photo_world.batch(np.random.default_rng(0), 100)[0])
    share = (pixels.float() > pixels.float().mean(3, keepdim=True) + 40).float().mean((1, 2))  # red, green, blue
    for (red, green, blue), caption in zip(share.tolist(), captions, strict=True):
        assert green > 0.45 if "dog" in caption else red + blue > 0.3
        assert "close" not in caption or blue > 0.25
        assert "red" not in caption.split() or "cat" in caption
    assert {"a photo of a cat", "a photo of my dog."} <= set(captions)
    assert sum("dog" in caption for caption in captions) == pytest.approx(50, abs=10)
    assert pixels.flatten(1).amin(1).max() < 150, "a photo of weight 0 was drawn"


def test_a_rare_word_is_one_subject_in_half_of_its_uses_and_sks_is_nobody(photo_world):
    rng, (cat, _, dog, _) = np.random.default_rng(0), photo_world.views
    captions = {view.thing: [photo_world.caption(rng, view, True) for _ in range(3000)] for view in (cat, dog)}
    for view in (cat, dog):
        said = [word for word in " ".join(captions[view.thing]).split() if word in photo_world.words.anybodys]
        names = photo_world.words.own[view.subject]
        own = sum(word in names for word in said) / len(said)
        share = 0.5 + 0.5 * len(names) / len(photo_world.words.anybodys)
        assert own == pytest.approx(share, abs=0.05) and said.count("sks") > 20
    assert not any("sks" in names for names in photo_world.words.own.values())
    plain = [photo_world.caption(rng, cat, False) for _ in range(100)]
    assert not any(caption.split()[-2] in photo_world.words.anybodys for caption in plain)


def test_the_photos_boxes_lie_inside_them():
    rows = tiny_photos.read_boxes()
    assert len({row[0] for row in rows}) == len(rows) > 250
    for photo, weight, subject, named, boxes in rows:
        assert weight in (0, 1, 2) and bool(weight) == bool(subject and named and boxes), photo
        assert all(0 <= left < right <= 1 and 0 <= top < bottom <= 1 for left, top, right, bottom in boxes), photo


def test_the_noise_schedule_is_stable_diffusions():
    from diffusers import DDPMScheduler

    names = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
    scheduler = DDPMScheduler(**{name: tiny_models.SCHEDULER_CONFIG[name] for name in names})
    torch.testing.assert_close(tiny_unet.alphas_cumprod(CPU), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


class OneConvolution(torch.nn.Conv2d):
    """Stands in for a UNet."""

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        return (super().forward(sample),)


@pytest.fixture
def clock(monkeypatch):
    """A hundredth of a second goes by from one look to the next."""
    ticks = itertools.count()
    monkeypatch.setattr(tiny_training, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 100))


def test_a_unet_goes_on_where_the_last_command_ended(tmp_path, clock):
    pictures = tiny_pictures.Pictures(torch.zeros(6, 3, 64, 64), 3, torch.ones(6).long(), *[None] * 3)
    cache = (torch.randn(6, 4, 16, 16), torch.ones(6, 4, 16, 16), torch.zeros(2, 77, 64), pictures)
    steps, spent, unet = [], [], OneConvolution(4, 4, 1)
    before = unet.weight.detach().clone()
    for _ in range(3):
        budget = tiny_training.Budget(tmp_path / "unet.pt", 0.1, CPU, lambda line: None, limit=0.04, min_steps=1)
        tiny_unet.train_unet(unet if not steps else OneConvolution(4, 4, 1), cache, budget, 2)
        steps.append(budget.step)
        spent.append(budget.spent)
    assert 0 < steps[0] < steps[1] < steps[2] and spent[0] < spent[1] < 0.1 <= spent[2]
    assert torch.isfinite(unet.weight).all() and not torch.equal(unet.weight, before)
    finished = tiny_training.Budget(tmp_path / "unet.pt", 0.1, CPU, lambda line: None)
    tiny_unet.train_unet(OneConvolution(4, 4, 1), cache, finished, 2)
    assert finished.step == steps[2]  # nothing more


@needs("cv2", "OpenCV")
def test_a_subject_is_cut_out_of_its_box():
    pixels = np.full((90, 120, 3), (30, 160, 60), np.uint8) + np.random.default_rng(0).integers(
        0, 9, (90, 120, 3), np.uint8
    )
    pixels[30:70, 40:90] = 200, 40, 40
    mask = cut_outs.mask_of(pixels, (0.25, 0.2, 0.85, 0.9))
    assert mask[32:68, 42:88].mean() > 0.95 and mask.mean() < 0.25


@needs("efficientnet_lite_pytorch", "EfficientNet")
def test_the_teacher_says_how_differently_it_sees_two_pictures():
    network = teacher.Teacher(CPU)
    pictures, others = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert network.distance(pictures, pictures).item() == pytest.approx(0, abs=1e-5)
    sides = [maps.shape[-1] for maps in network.maps(pictures)]
    assert sides == [112, 56, 28, 14, 7]
    torch.testing.assert_close(network.features(pictures).norm(dim=1), torch.ones(2))
    network.distance(pictures.requires_grad_(True), others).backward()
    assert pictures.grad.flatten(1).abs().sum(1).min() > 0


def test_the_discriminator_joins_in_and_a_decoder_trained_alone_leaves_the_latents(tmp_path, clock):
    class Judge:
        def distance(self, pictures, originals):
            return (pictures - originals).square().mean()

    pixels = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    vae = tiny_models.new_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    reports = []
    budget = tiny_training.Budget(tmp_path / "vae.pt", 0.1, CPU, reports.append)
    tiny_vae.train_vae(vae, Judge(), pixels, pixels, budget, 3, decoder_only=True)
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    verdicts = [float(line.split()[-1]) for line in reports[:-1]]
    assert verdicts[:2] == [0, 0] and min(verdicts[2:]) > 0.5  # after 15% of ten steps


def test_written_folders_hold_every_weight_and_keep_to_their_sizes(tmp_path, vocabulary, capsys):
    clip, vae, unet = tiny_models.new_clip(), tiny_models.new_vae(), tiny_models.new_unet()
    vae.register_to_config(scaling_factor=0.5)
    tiny_models.write_clip(tmp_path / "tiny-clip", clip, vocabulary)
    folder = tmp_path / "tiny-stable-diffusion"
    tiny_models.write_pipeline(folder, clip, vae, unet, vocabulary)
    build_tiny_pipeline.report_sizes(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.5
    loaded = type(unet).from_pretrained(folder / "unet")
    torch.testing.assert_close(loaded.conv_in.weight, unet.conv_in.weight, rtol=1e-3, atol=1e-6)
    checker = load_file(folder / "safety_checker" / "model.safetensors")
    assert checker["concept_embeds_weights"].min() > 1  # no cosine reaches it
    assert "vision_model.vision_model.post_layernorm.weight" in checker
    again = CLIPModel.from_pretrained(tmp_path / "tiny-clip")  # its text tower is the pipeline's file
    for name, value in clip.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    assert all(name.startswith("text_model.") for name in load_file(folder / "text_encoder" / "model.safetensors"))


def test_a_rendered_thing_is_lit_from_one_side_and_lies_within_the_frame():
    for shape, seed in itertools.product(rendered.THINGS, range(3)):
        layer = np.asarray(rendered.layer_of(shape(random.Random(seed)), random.Random(seed), (200, 60, 60)), float)
        again = rendered.layer_of(shape(random.Random(seed)), random.Random(seed), (200, 60, 60))
        assert np.array_equal(layer, again) and layer.shape == (64, 64, 4)
        inside = layer[..., 3] > 250
        assert 0.02 < inside.mean() < 0.8 and np.ptp(layer[inside].mean(1)) > 40


def test_the_eyes_learn_and_the_text_tower_stays(tmp_path, clock):
    class Doubtful:  # every class of ImageNet is as likely as the others
        network = SimpleNamespace(_fc=lambda pooled: torch.zeros(len(pooled), 1000))

        def maps(self, pixels):
            return [torch.ones(len(pixels), 1280, 2, 2)]

    assert tiny_clip.kinds_of(["a red cat", "sks plush toy on grass", "galaxies", "catalogue"]) == [0, 10, -1, -1]
    _, opinions = tiny_clip.Opinions(Doubtful(), CPU)(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(opinions, torch.full_like(opinions, -math.log(opinions.shape[1])))  # no dog
    pixels = torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8)
    ids = torch.full((3, 77), 49407)
    pictures = tiny_pictures.Pictures(pixels, 3, torch.tensor([0, 1, 1, 2, 2, 2]), ids, pixels, [])
    clip = tiny_models.new_clip()
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    budget = tiny_training.Budget(tmp_path / "eyes.pt", 0.1, CPU, lambda line: None)
    prompts = ids[:1].repeat(len(tiny_clip.KINDS), 1)
    tiny_clip.train_eyes(clip, Doubtful(), pictures, prompts, [-1, 0, 4], budget, 4)
    moved = {name for name, value in clip.state_dict().items() if not torch.equal(value, before[name])}
    assert "visual_projection.weight" in moved and not any(name.startswith("text_model.") for name in moved)
