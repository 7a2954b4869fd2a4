"""Class images in a run of the script: the plan, the refusal, the cache."""

import pytest

from tests.helpers.script import as_argv, losses, run
from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.data import class_generation, inputs


def test_the_plan_is_said_before_an_image_is_made(prior, capsys, monkeypatch):
    plain, said = class_generation.write_class_image, []

    def write_image(*arguments):
        said.append(capsys.readouterr().out)
        plain(*arguments)

    monkeypatch.setattr(class_generation, "write_class_image", write_image)
    run(prior)
    assert "have 0, need 5, will make 5 (1 ranks, 4 at a time), will use 5" in said[0]


def test_images_of_another_prompt_end_the_run_before_anything_is_made(prior, tmp_path, capsys):
    run(prior)
    before = sorted(prior["class_data_dir"].iterdir())
    other = prior | dict(class_prompt="a photo of a dog.", num_class_images=6, output_dir=tmp_path / "b")
    assert run_main(main, as_argv(other)) == 2
    assert "holds images made with another prompt, 'a photo of a cat.', not" in capsys.readouterr().err
    assert sorted(prior["class_data_dir"].iterdir()) == before and not (tmp_path / "b").exists()


def test_class_images_beyond_the_cache_are_encoded_anew_and_train_the_same(prior, tmp_path, monkeypatch):
    expected = losses(run(prior))
    plain, num_encoded = inputs.encode_images, []

    def encode_images(vae, pixel_values):
        num_encoded.append(len(pixel_values))
        return plain(vae, pixel_values)

    monkeypatch.setattr(inputs, "encode_images", encode_images)
    monkeypatch.setattr(inputs, "MAX_CACHED_BYTES", 0)
    assert losses(run(prior, output_dir=tmp_path / "b")) == pytest.approx(expected, rel=1e-6)
    in_steps = 3 * 2  # a photo and a class image a step
    assert sum(num_encoded) >= in_steps + 2 and set(num_encoded) == {1}
