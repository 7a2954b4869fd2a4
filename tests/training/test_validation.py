"""Validation while training: a readable curve, samples that are the model's own, and no influence on the training."""

import json

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests.helpers.pipelines import edit_json, write_photos
from tests.helpers.script import LATEST, as_argv, bits, run, run_json
from train_dreambooth_colossalai import main
from utils.arguments import parse_args
from utils.models.folder import read_base
from utils.models.loading import load_sampling_scheduler

PROMPT = "a photo of my cat."


def train(flags: dict, output, **changes) -> list[dict]:
    """Rows of validation.jsonl after four steps at a large learning rate."""
    run(flags | dict(max_train_steps=4, output_dir=output) | changes)
    path = output / "validation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_curve_falls_is_repeatable_and_does_not_touch_the_training(flags, tmp_path):
    rows = train(flags, tmp_path / "a", validation_steps=2)
    assert [row["step"] for row in rows] == [0, 2, 4]
    losses = [row["validation_loss"] for row in rows]
    assert losses[0] > losses[1] > losses[2]
    again = train(flags, tmp_path / "b", validation_steps=4)
    assert again == [rows[0], rows[2]]
    assert train(flags, tmp_path / "c") == []
    assert bits(tmp_path / "a") == bits(tmp_path / "c")


def test_samples_are_what_the_saved_pipeline_draws(flags, tmp_path):
    """Of each prompt, with the settings that are asked for."""
    settings = dict(negative_prompt="blurry", num_inference_steps=3, guidance_scale=3)
    flags |= {f"validation_{name.removeprefix('num_')}": value for name, value in settings.items()}
    flags |= dict(validation_prompt=PROMPT, validation_steps=4, num_validation_images=2, seed=3, max_train_steps=4)
    assert main([*as_argv(flags), "--validation_prompt=a red boat"]) == 0
    folder = tmp_path / "output/validation"
    places = [(step, which, seed) for step in (0, 4) for which in ("-prompt-2", "") for seed in (3, 4)]
    names = [f"step-{step:06d}{which}-seed-{seed}.png" for step, which, seed in places]
    assert sorted(path.name for path in folder.iterdir()) == names

    def difference(name: str) -> int:
        return np.abs(np.asarray(Image.open(folder / name), int) - np.asarray(expected, int)).max()

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "output", local_files_only=True)
    for prompt, which in ((PROMPT, ""), ("a red boat", "-prompt-2")):
        expected = pipeline(prompt, generator=torch.Generator().manual_seed(4), **settings).images[0]
        assert difference(f"step-000004{which}-seed-4.png") <= 1
        assert difference(f"step-000000{which}-seed-4.png") > 1  # of the model before its training
    recorded = run_json(tmp_path / "output")["arguments"]["validation_prompt"]
    assert recorded == [PROMPT, "a red boat"]
    assert parse_args(["--config", str(tmp_path / "output/run.json")]).validation_prompt == recorded


def test_samples_are_drawn_with_the_scheduler_that_the_base_names(base):
    """In its whole: PNDM would ignore that the last noise level is to have no signal."""
    zero = dict(
        rescale_betas_zero_snr=True, clip_sample=False, timestep_spacing="trailing", _class_name="DDIMScheduler"
    )
    edit_json(base / "scheduler/scheduler_config.json", **zero)
    edit_json(base / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    ours = load_sampling_scheduler(read_base(base))
    theirs = StableDiffusionPipeline.from_pretrained(base, local_files_only=True).scheduler
    assert type(ours) is type(theirs) and ours.alphas_cumprod[-1] == theirs.alphas_cumprod[-1] == 0


def test_a_resumed_run_goes_on_with_the_curve(flags, tmp_path):
    photos = write_photos(tmp_path / "photos", size=(48, 64))
    flags |= dict(instance_data_dir=photos, validation_steps=1, checkpointing_steps=2, center_crop=True)
    whole = train(flags, tmp_path / "whole")
    train(flags, tmp_path / "cut", max_train_steps=2)
    with (tmp_path / "cut" / "validation.jsonl").open("a") as file:
        file.write('{"step": 3, "validation_loss": 9}\n{"step": 4, "valid')
    assert train(flags | LATEST, tmp_path / "cut") == whole
