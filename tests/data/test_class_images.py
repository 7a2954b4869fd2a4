"""Class images: what is there is used, what is missing is made once, nothing foreign is mixed in."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.photos import turned
from tests.helpers.pipelines import write_photos, write_pipeline
from tests.helpers.script import as_argv, run
from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.concepts import Concept
from utils.data import class_images
from utils.data.class_generation import image_seed, make_batch
from utils.data.class_images import ClassPlan, file_name
from utils.data.inputs import drawn_class_images
from utils.data.randomness import CLASS, draw_sample
from utils.dataset import ClassDataset, InstanceDataset
from utils.errors import UserError
from utils.models import drawing
from utils.models.check import check_base_model
from utils.models.folder import read_base
from utils.run.resume import hash_files

SETTINGS = dict(
    prompt="a photo of a cat.",
    model="abc",
    scheduler="PNDMScheduler",
    num_inference_steps=2,
    guidance_scale=7.5,
    height=16,
    width=16,
)


@pytest.fixture
def concept(tmp_path) -> Concept:
    return Concept("a photo of my cat.", tmp_path / "photos", "a photo of a cat.", tmp_path / "class")


def write_made(folder, number: int, **changes) -> None:
    """A class image as this program writes it."""
    folder.mkdir(exist_ok=True)
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8))
    class_images.write_class_image(
        folder / file_name(number), image, dict(number=number, seed=number + 7, settings=SETTINGS | changes)
    )


def plan_of(concept: Concept, num_class_images: int) -> ClassPlan:
    return class_images.plan_class_images(concept.class_data_dir, concept.class_prompt, SETTINGS, num_class_images)


def numbers_used(plan) -> list[str]:
    return [path.name for path in plan.used]


def test_an_empty_folder_needs_all(concept):
    plan = plan_of(concept, 3)
    assert (plan.num_found, plan.missing) == (0, [0, 1, 2]) and numbers_used(plan) == [file_name(n) for n in range(3)]
    assert not concept.class_data_dir.exists()
    assert "have 0, need 3, will make 3 (2 ranks, 4 at a time), will use 3" in plan.summary(2, 4)


def test_gaps_are_filled_and_what_is_there_is_kept(concept):
    for number in (0, 2, 5):
        write_made(concept.class_data_dir, number)
    plan = plan_of(concept, 5)
    assert (plan.num_found, plan.missing) == (3, [1, 3])
    assert numbers_used(plan) == [file_name(n) for n in (0, 1, 2, 3, 5)]
    fewer = plan_of(concept, 2)
    assert fewer.missing == [] and numbers_used(fewer) == [file_name(0), file_name(2)]


OTHER = dict(prompt="a photo of a dog.", model="def", scheduler="DDIMScheduler", num_inference_steps=3)
OTHER |= dict(guidance_scale=1.0, height=32, width=32)


@pytest.mark.parametrize(("name", "value"), OTHER.items())
def test_images_of_another_prompt_or_model_are_refused(concept, name, value):
    write_made(concept.class_data_dir, 0)
    write_made(concept.class_data_dir, 1, **{name: value})
    said = f"made with another {name.replace('_', ' ')}, {value!r}, not {SETTINGS[name]!r}"
    with pytest.raises(UserError, match=said):
        plan_of(concept, 1)


def test_every_setting_that_is_compared_is_tested(tiny_pipeline_dir):
    assert OTHER.keys() == class_images.generation_settings(read_base(tiny_pipeline_dir), "abc", "a cat").keys()


def test_images_of_the_users_own_are_used_if_they_are_enough_and_not_filled_up(concept):
    write_photos(concept.class_data_dir, 3)
    plan = plan_of(concept, 2)
    assert plan.missing == [] and numbers_used(plan) == ["photo-0.jpg", "photo-1.jpg"]
    assert "have 3, need 2, will make 0, will use 2\nthis program did not make" in plan.summary(1, 4)
    with pytest.raises(UserError, match="holds 3 images that this program did not make.*--num_class_images 3"):
        plan_of(concept, 4)


def test_the_users_images_beside_ours_are_left_out_and_said_to_be(concept):
    write_made(concept.class_data_dir, 0)
    write_photos(concept.class_data_dir, 3)
    plan = plan_of(concept, 2)
    assert numbers_used(plan) == [file_name(0), file_name(1)] and plan.missing == [1]
    assert "left out: 3 images" in plan.summary(1, 4)


def test_a_dry_run_finds_damaged_images_of_the_users_own(prior, tmp_path, capsys):
    write_photos(tmp_path / "class", 5)
    file = tmp_path / "class/photo-2.jpg"
    file.write_bytes(file.read_bytes()[:600])
    for dry in (True, None):
        assert run_main(main, as_argv(prior | dict(dry_run=dry))) == 2
        out, err = capsys.readouterr()
        assert "photo-2.jpg" in (out if dry else err)
    assert not prior["output_dir"].exists()


def test_a_dry_run_says_how_many_are_there_and_what_is_wrong_with_them(prior, tmp_path, capsys):
    assert main(as_argv(prior | dict(dry_run=True))) == 0
    assert "'a photo of a cat.' in " in (out := capsys.readouterr().out) and "have 0, will make 5, will use 5" in out
    run(prior)
    (tmp_path / "class/class-00001.png").unlink()
    capsys.readouterr()
    assert main(as_argv(prior | dict(dry_run=True))) == 0
    assert "have 4, will make 1, will use 5" in capsys.readouterr().out
    assert main(as_argv(prior | dict(dry_run=True, class_prompt="a dog"))) == 2
    assert "images made with another prompt" in capsys.readouterr().out
    file = tmp_path / "class/class-00003.png"
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    assert main(as_argv(prior | dict(dry_run=True))) == 2
    assert "class-00003.png is damaged" in capsys.readouterr().out  # found by its checksum


def test_an_image_cut_short_is_made_again(concept):
    for number in range(2):
        write_made(concept.class_data_dir, number)
    path = concept.class_data_dir / file_name(1)
    path.write_bytes(path.read_bytes()[:-20])
    assert plan_of(concept, 2).missing == [1]
    write_made(concept.class_data_dir, 1)
    assert plan_of(concept, 2).missing == []


def test_a_copy_under_another_name_does_not_count_twice(concept):
    write_made(concept.class_data_dir, 0)
    (concept.class_data_dir / file_name(1)).write_bytes((concept.class_data_dir / file_name(0)).read_bytes())
    assert plan_of(concept, 2).missing == [1]


def test_the_model_hash_is_of_the_weights_not_of_the_place(tmp_path, tiny_pipeline_dir, base):
    def hash_of(folder) -> str:
        return class_images.model_hash(hash_files(check_base_model(folder))["sha256"])

    assert hash_of(base) == hash_of(tiny_pipeline_dir)
    (base / "vae/.hidden").write_text("x")
    assert hash_of(base) == hash_of(tiny_pipeline_dir)
    assert hash_of(write_pipeline(tmp_path / "other", seed=1)) != hash_of(base)


def test_seeds_differ_by_number_attempt_and_run():
    seeds = {image_seed(run, number, attempt) for run in (0, 1) for number in range(50) for attempt in range(4)}
    assert len(seeds) == 400
    assert image_seed(0, 3, 0) == 3645047520, "a class folder half made by an earlier version would change"


def stub_draw(monkeypatch, spoiled: set[int], value: float) -> list[int]:
    """drawing.draw gives noise, or `value` alone for the seeds in `spoiled`; returns the seeds asked for."""
    asked = []

    def draw(_pipeline, seeds, **_settings):
        asked.extend(seeds)
        images = [torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(
            [
                torch.full_like(image, value) if seed in spoiled else image
                for image, seed in zip(images, seeds, strict=True)
            ]
        )

    monkeypatch.setattr(drawing, "draw", draw)
    return asked


@pytest.mark.parametrize("value", [0.0, float("nan"), 0.5])
def test_a_blank_image_is_made_again_with_another_seed(concept, monkeypatch, value):
    asked = stub_draw(monkeypatch, {image_seed(5, 1, 0), image_seed(5, 1, 1)}, value)
    plan = plan_of(concept, 3)
    plan.folder.mkdir()
    make_batch(None, plan, plan.missing, seed=5)
    first = [image_seed(5, number, 0) for number in range(3)]
    assert asked == [*first, image_seed(5, 1, 1), image_seed(5, 1, 2)]
    assert plan_of(concept, 3).missing == []
    assert class_images.read_metadata(plan.folder / file_name(1))["seed"] == image_seed(5, 1, 2)
    assert not list(plan.folder.glob(".*"))


def test_an_image_that_stays_blank_ends_the_run(concept, monkeypatch):
    stub_draw(monkeypatch, {image_seed(0, 1, attempt) for attempt in range(9)}, 0.0)
    plan = plan_of(concept, 2)
    plan.folder.mkdir()
    with pytest.raises(UserError, match="4 times in a row; try --prior_generation_precision fp32"):
        make_batch(None, plan, plan.missing, seed=0)


class TestClassDataset:
    """As InstanceDataset, but images are opened when they are asked for."""

    @pytest.fixture
    def plan(self, concept):
        folder = write_photos(concept.class_data_dir, 3, size=(48, 32))
        Image.open(folder / "photo-2.jpg").save(folder / "photo-2.jpg", exif=turned(6))
        return plan_of(concept, 3)

    @pytest.mark.parametrize("center_crop", [False, True])
    def test_the_same_crops_as_of_photos(self, plan, center_crop):
        dataset = ClassDataset([(path, plan.prompt) for path in plan.used], 16, center_crop)
        photos = InstanceDataset(plan.folder, 16, center_crop)
        assert len(dataset) == 3 and dataset.has_fixed_crops == photos.has_fixed_crops == center_crop
        assert dataset.prompt(2) == "a photo of a cat."
        for number in range(3):
            origin = dataset.crop_origin(number, (0.9, 0.7))
            assert origin == photos.crop_origin(number, (0.9, 0.7))
            assert torch.equal(dataset.pixel_values(number, *origin), photos.pixel_values(number, *origin))

    def test_no_image_is_decoded_before_it_is_drawn(self, plan, monkeypatch):
        decoded = []
        monkeypatch.setattr("utils.dataset.decode", lambda path: decoded.append(path) or Image.open(path))
        dataset = ClassDataset([(path, plan.prompt) for path in plan.used], 16, center_crop=True)
        assert decoded == []
        dataset.pixel_values(1, 0, 0)
        assert decoded == [plan.folder / "photo-1.jpg"]


def test_only_images_that_a_run_draws_are_encoded():
    drawn = drawn_class_images(3, 10, 50)
    sizes = dict(num_photos=50, latent_shape=(1, 1, 1), num_train_timesteps=9, stream=CLASS)
    assert drawn == {draw_sample(3, index, **sizes).photo for index in range(10)} and len(drawn) == 10
    assert drawn_class_images(3, 10, 7) == set(range(7))
