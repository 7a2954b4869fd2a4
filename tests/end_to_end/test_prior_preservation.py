"""Prior preservation, loss weights, captions and several subjects: the formulas, and the script from end to end."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tests.helpers.pipelines import SCHEDULER_CONFIG, write_photos
from tests.helpers.script import as_argv, losses, rows, run, run_json
from train_dreambooth_colossalai import main
from utils import class_images
from utils.concepts import read_concepts
from utils.diffusion import denoising_loss, min_snr_weights
from utils.errors import UserError, run_main
from utils.randomness import CLASS, draw_sample
from utils.train_step import TrainStep

DRAW = dict(num_photos=4, latent_shape=(4, 8, 8), num_train_timesteps=1000)


def make_scheduler(**options) -> DDPMScheduler:
    schedule = {key: SCHEDULER_CONFIG[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    return DDPMScheduler(**schedule, **options)


class TestLossWeights:
    """min-SNR and prior preservation against their closed forms."""

    @pytest.mark.parametrize("gamma", [1.0, 5.0])
    def test_min_snr_for_the_noise(self, gamma):
        scheduler = make_scheduler()
        alphas = scheduler.alphas_cumprod.double()
        snr = alphas / (1 - alphas)
        expected = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64)) / snr
        weights = min_snr_weights(scheduler, gamma)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
        assert weights[-1] == 1 and weights[0] < 0.01 * gamma

    def test_min_snr_for_the_velocity(self):
        scheduler = make_scheduler(prediction_type="v_prediction")
        alphas = scheduler.alphas_cumprod.double()
        snr = alphas / (1 - alphas)
        torch.testing.assert_close(min_snr_weights(scheduler, 5.0).double(), snr.clamp(max=5) / (snr + 1))

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_a_schedule_that_ends_in_pure_noise(self, prediction_type):
        scheduler = make_scheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
        assert torch.isfinite(min_snr_weights(scheduler, 5.0)).all()

    def test_both_predictions_weigh_an_error_of_the_clean_latents_alike(self):
        """The point of min-SNR: what the network predicts must not change what an error costs."""
        weights = [min_snr_weights(make_scheduler(prediction_type=p), 5.0) for p in ("epsilon", "v_prediction")]
        alphas = make_scheduler().alphas_cumprod.double()
        # An error e of the clean latents is an error sqrt(snr) e of the noise and e / sqrt(1 - alpha) of the velocity.
        cost = [weights[0] * alphas / (1 - alphas), weights[1] / (1 - alphas)]
        torch.testing.assert_close(cost[0], cost[1], rtol=1e-5, atol=0)

    def test_weights_stay_with_their_half(self):
        generator = torch.Generator().manual_seed(0)
        model_pred, target = torch.randn(2, 6, 4, 2, 2, generator=generator)
        table = torch.rand(10, generator=generator)
        timesteps = torch.tensor([1, 4, 9, 0, 0, 7])
        step = SimpleNamespace(inputs=SimpleNamespace(timestep_weights=table, class_latents=object()))
        instance_loss, class_loss = TrainStep._losses(step, model_pred, target, timesteps)
        each = (model_pred - target).double().square().flatten(1).mean(1) * table[timesteps]
        torch.testing.assert_close(instance_loss.double(), each[:3].mean())
        torch.testing.assert_close(class_loss.double(), each[3:].mean())

    def test_weights_of_one_change_nothing(self):
        model_pred, target = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            denoising_loss(model_pred, target, torch.ones(3)), denoising_loss(model_pred, target)
        )


class TestDraws:
    """Class samples have streams of their own, and never move those of the photos."""

    def test_the_draws_of_class_samples_never_change(self):
        sample = draw_sample(0, 5, **DRAW, stream=CLASS)
        assert (sample.photo, sample.timestep) == (3, 842)
        photo = draw_sample(0, 5, **DRAW)
        assert abs(np.corrcoef(sample.noise.ravel(), photo.noise.ravel())[0, 1]) < 0.2
        assert abs(np.corrcoef(sample.latent_noise.ravel(), photo.latent_noise.ravel())[0, 1]) < 0.2

    def test_a_noise_offset_shifts_whole_channels_by_its_size(self):
        shifts = []
        for index in range(300):
            plain, shifted = (draw_sample(1, index, **DRAW, noise_offset=offset) for offset in (0.0, 0.1))
            shift = shifted.noise - plain.noise
            assert np.ptp(shift, axis=(1, 2)).max() < 1e-6
            assert shifted.timestep == plain.timestep and (shifted.latent_noise == plain.latent_noise).all()
            shifts.append(shift[:, 0, 0])
        assert np.std(shifts) == pytest.approx(0.1, rel=0.1)


def test_the_loss_is_the_photos_plus_the_weighted_class_images(prior):
    found = run(prior, prior_loss_weight=0.5)
    for row in found:
        assert row["loss"] == pytest.approx(row["instance_loss"] + 0.5 * row["class_loss"], rel=1e-6)
        assert row["instance_loss"] != row["class_loss"]


def test_a_weight_of_zero_trains_as_without(prior, flags, tmp_path):
    found = run(prior, prior_loss_weight=0, train_batch_size=2)
    assert [row["instance_loss"] for row in found] == pytest.approx(
        losses(run(flags, train_batch_size=2, output_dir=tmp_path / "b")), rel=1e-5
    )
    assert "class_loss" not in rows(tmp_path / "b")[0] and "instance_loss" not in rows(tmp_path / "b")[0]


def test_class_images_are_made_once(prior, capsys):
    run(prior)
    assert "have 0, need 5, will make 5" in capsys.readouterr().out
    folder = prior["class_data_dir"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["file"] for entry in manifest["images"]] == [f"class-{n:05d}.png" for n in range(5)]
    settings = dict(scheduler="PNDMScheduler", num_inference_steps=2, guidance_scale=7.5, height=32, width=32)
    model = class_images.model_hash(prior["pretrained_model_name_or_path"])
    assert manifest["settings"] == settings | dict(prompt="a photo of a cat.", model=model)
    for entry in manifest["images"]:
        assert class_images.read_metadata(folder / entry["file"])["seed"] == entry["seed"]
    assert len({entry["seed"] for entry in manifest["images"]}) == 5
    recorded = dict(folder=str(folder), prompt="a photo of a cat.", num_used=5)
    assert run_json(prior["output_dir"])["class_images"] == [recorded]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(prior)
    assert "have 5, need 5, will make 0, will use 5" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_options_change_the_loss_and_only_it(prior, tmp_path):
    prior |= dict(max_train_steps=1, train_batch_size=4)
    plain = run(prior)[0]
    for name, value in (("snr_gamma", 0.1), ("noise_offset", 0.1)):
        other = run(prior, output_dir=tmp_path / name, **{name: value})[0]
        assert other["instance_loss"] != plain["instance_loss"] and other["class_loss"] != plain["class_loss"]
    fewer = run(prior, num_class_images=4, output_dir=tmp_path / "fewer")[0]
    assert fewer["instance_loss"] == plain["instance_loss"] and fewer["class_loss"] != plain["class_loss"]


def test_micro_batches_of_both_halves_are_one_batch(prior, tmp_path):
    batch = run(prior, train_batch_size=4, snr_gamma=5)
    micro = run(prior, train_batch_size=2, gradient_accumulation_steps=2, snr_gamma=5, output_dir=tmp_path / "micro")
    for name in ("loss", "instance_loss", "class_loss", "grad_norm"):
        assert [row[name] for row in micro] == pytest.approx([row[name] for row in batch], rel=1e-5)


def test_captions_replace_the_prompt_photo_by_photo(flags, tmp_path):
    expected = losses(run(flags, train_batch_size=4))
    photos = write_photos(tmp_path / "photos")
    flags |= dict(instance_data_dir=photos, train_batch_size=4, output_dir=tmp_path / "b")
    for number in range(4):
        (photos / f"photo-{number}.txt").write_text(f" {flags['instance_prompt']}\n", encoding="utf-8-sig")
    assert losses(run(flags, instance_prompt="not used")) == pytest.approx(expected, rel=1e-6)
    (photos / "photo-1.txt").write_text("my cat asleep\n")
    found = losses(run(flags))
    assert found[0] != pytest.approx(expected[0], rel=1e-6)
    record = run_json(tmp_path / "b")
    assert [photo.get("prompt") for photo in record["photos"]] == [None, "my cat asleep", None, None]
    assert record["skipped_files"] == []


def test_a_class_folder_that_cannot_be_written(prior, tmp_path, capsys, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device", "class-00000.png")

    monkeypatch.setattr("utils.class_generation.write_image", full_disk)
    assert run_main(main, as_argv(prior)) == 2
    said = capsys.readouterr().err
    assert "No space left on device: 'class-00000.png'" in said and "Traceback" not in said


@pytest.mark.parametrize(("content", "message"), [(b" \n", "is empty"), (b"\xff\xfe\x00", "cannot be read as UTF-8")])
def test_a_caption_that_says_nothing(flags, tmp_path, capsys, content, message):
    photos = write_photos(tmp_path / "photos")
    (photos / "photo-2.txt").write_bytes(content)
    assert run_main(main, as_argv(flags | dict(instance_data_dir=photos))) == 2
    assert f"photo-2.txt, the caption of photo-2.jpg, {message}" in capsys.readouterr().err


def without_subject(flags: dict, entries: object, tmp_path: Path) -> dict:
    """The flags with --concepts_list in the place of those that it replaces."""
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(entries))
    replaced = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir")
    return {name: value for name, value in flags.items() if name not in replaced} | dict(concepts_list=path)


def concept_entry(flags: dict) -> dict:
    names = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir")
    return {name: str(flags[name]) for name in names if name in flags}


def test_a_list_of_one_concept_is_the_flags(prior, tmp_path):
    expected = losses(run(prior))
    listed = without_subject(prior, [concept_entry(prior)], tmp_path)
    assert losses(run(listed, output_dir=tmp_path / "b")) == expected


def test_two_subjects_of_two_classes(prior, tmp_path, capsys):
    dogs = dict(instance_prompt="a photo of my dog.", instance_data_dir=str(write_photos(tmp_path / "dogs", 2)))
    dogs |= dict(class_prompt="a photo of a dog.", class_data_dir=str(tmp_path / "class-dog"))
    listed = without_subject(prior, [concept_entry(prior), dogs], tmp_path)
    found = run(listed, train_batch_size=3)
    said = capsys.readouterr().out
    assert said.count("have 0, need 5, will make 5") == 2
    assert "6 photos at 32 px, 2 prompts 'a photo of my cat.', 'a photo of my dog.'" in said
    assert len(list((tmp_path / "class-dog").glob("*.png"))) == 5
    assert all(np.isfinite(row["class_loss"]) for row in found)


def test_the_class_fields_of_a_list_are_for_prior_preservation_only(flags, tmp_path):
    entry = concept_entry(flags) | dict(class_prompt="a cat", class_data_dir=str(tmp_path / "class"))
    expected = losses(run(flags))
    assert losses(run(without_subject(flags, [entry], tmp_path), output_dir=tmp_path / "b")) == expected
    assert not (tmp_path / "class").exists()


GOOD = dict(instance_prompt="my cat", instance_data_dir="cats", class_prompt="a cat", class_data_dir="class")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "is not a list of objects"),
        ([], "is not a list of objects"),
        (["cats"], "is not a list of objects"),
        ([GOOD, GOOD | dict(instance_prompt=" ")], "concept 2: 'instance_prompt' is missing or empty$"),
        ([{"instance_prompt": "my cat"}], "concept 1: 'instance_data_dir' is missing or empty$"),
        ([GOOD | dict(class_data_dir=3)], "'class_data_dir' is missing or empty, which --with_prior_preservation"),
        ([GOOD | dict(num_class_images=3)], "there is no field 'num_class_images'"),
        ([GOOD | dict(class_data_dir="cats")], "--class_data_dir cats overlaps cats"),
        ([GOOD | dict(class_data_dir="output/class")], "--class_data_dir output/class overlaps output"),
        ([GOOD | dict(instance_data_dir="output")], "--output_dir output overlaps the photos' folder output"),
        ([GOOD, GOOD | dict(class_prompt="a dog")], "is given for two class prompts, 'a cat' and 'a dog'"),
    ],
)
def test_a_malformed_list_of_concepts(tmp_path, entries, message):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(entries))
    args = Namespace(concepts_list=path, with_prior_preservation=True, output_dir=Path("output"))
    with pytest.raises(UserError, match=message):
        read_concepts(args)


def test_a_list_that_is_no_json(tmp_path):
    path = tmp_path / "concepts.json"
    args = Namespace(concepts_list=path, with_prior_preservation=False, output_dir=Path("output"))
    with pytest.raises(UserError, match="--concepts_list .*cannot be read as JSON"):
        read_concepts(args)
    path.write_text("[")
    with pytest.raises(UserError, match="--concepts_list .*cannot be read as JSON"):
        read_concepts(args)


def test_captions_and_folders_are_part_of_what_a_resumed_run_compares(tmp_path):
    from utils.run_inputs import photo_hashes

    def photo(path: str, prompt: str) -> SimpleNamespace:
        return SimpleNamespace(path=Path(path), sha256="abc", prompt=prompt)

    assert photo_hashes([photo("a/1.jpg", "my cat")], "my cat") == {"1.jpg": "abc"}
    assert photo_hashes([photo("a/1.jpg", "asleep")], "my cat") == {"1.jpg": "abc 'asleep'"}
    two = photo_hashes([photo("a/1.jpg", "my cat"), photo("b/1.jpg", "my dog")], None)
    assert two == {"a/1.jpg": "abc 'my cat'", "b/1.jpg": "abc 'my dog'"}
