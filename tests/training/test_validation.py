"""Validation while training: a readable curve, samples that are the model's own, and no influence on the training."""

import json

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests.helpers.pipelines import write_photos
from train_dreambooth_colossalai import main
from utils.arguments import parse_args

PROMPT = "a photo of my cat."


def train(base, photos, output, *flags: str) -> list[dict]:
    """Rows of validation.jsonl after four steps at a large learning rate."""
    argv = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}", f"--output_dir={output}"]
    argv += [f"--instance_prompt={PROMPT}", "--resolution=32", "--train_batch_size=1", "--learning_rate=1e-3"]
    assert main([*argv, "--max_train_steps=4", *flags]) == 0
    path = output / "validation.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(output) -> bytes:
    return (output / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_the_curve_falls_is_repeatable_and_does_not_touch_the_training(tiny_pipeline_dir, photos_dir, tmp_path):
    rows = train(tiny_pipeline_dir, photos_dir, tmp_path / "a", "--validation_steps=2")
    assert [row["step"] for row in rows] == [0, 2, 4]
    losses = [row["validation_loss"] for row in rows]
    assert losses[0] > losses[1] > losses[2]
    again = train(tiny_pipeline_dir, photos_dir, tmp_path / "b", "--validation_steps=4")
    assert again == [rows[0], rows[2]]
    assert train(tiny_pipeline_dir, photos_dir, tmp_path / "c") == []
    assert weights(tmp_path / "a") == weights(tmp_path / "c")


def test_samples_are_what_the_saved_pipeline_draws(tiny_pipeline_dir, photos_dir, tmp_path):
    flags = (f"--validation_prompt={PROMPT}", "--validation_steps=4", "--num_validation_images=2", "--seed=3")
    train(tiny_pipeline_dir, photos_dir, tmp_path / "out", *flags)
    names = sorted(path.name for path in (tmp_path / "out" / "validation").iterdir())
    assert names == [f"step-{step:06d}-seed-{seed}.png" for step in (0, 4) for seed in (3, 4)]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    expected = pipeline(PROMPT, generator=torch.Generator().manual_seed(4)).images[0]
    drawn = Image.open(tmp_path / "out" / "validation" / names[-1])
    assert np.abs(np.asarray(drawn, int) - np.asarray(expected, int)).max() <= 1
    untrained = Image.open(tmp_path / "out" / "validation" / names[1])
    assert np.abs(np.asarray(untrained, int) - np.asarray(expected, int)).max() > 1


def test_several_prompts_are_drawn_as_they_are_asked_for(tiny_pipeline_dir, photos_dir, tmp_path):
    flags = [f"--validation_prompt={PROMPT}", "--validation_prompt=a red boat", "--num_validation_images=1"]
    flags += ["--validation_negative_prompt=blurry", "--validation_inference_steps=3", "--validation_guidance_scale=3"]
    train(tiny_pipeline_dir, photos_dir, tmp_path / "out", *flags, "--validation_steps=4", "--report_to=tensorboard")
    folder = tmp_path / "out/validation"
    names = [f"step-{step:06d}{which}-seed-0.png" for step in (0, 4) for which in ("-prompt-2", "")]
    assert sorted(path.name for path in folder.iterdir()) == names
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    settings = dict(negative_prompt="blurry", num_inference_steps=3, guidance_scale=3)
    for prompt, name in ((PROMPT, names[3]), ("a red boat", names[2])):
        expected = pipeline(prompt, generator=torch.Generator().manual_seed(0), **settings).images[0]
        assert np.abs(np.asarray(Image.open(folder / name), int) - np.asarray(expected, int)).max() <= 1
    recorded = json.loads((tmp_path / "out/run.json").read_text())["arguments"]["validation_prompt"]
    assert recorded == [PROMPT, "a red boat"]
    assert parse_args(["--config", str(tmp_path / "out/run.json")]).validation_prompt == recorded


def test_a_resumed_run_goes_on_with_the_curve(tiny_pipeline_dir, tmp_path):
    photos = write_photos(tmp_path / "photos", size=(48, 64))
    flags = ("--validation_steps=1", "--checkpointing_steps=2", "--center_crop")
    whole = train(tiny_pipeline_dir, photos, tmp_path / "whole", *flags)
    train(tiny_pipeline_dir, photos, tmp_path / "cut", *flags, "--max_train_steps=2")
    with (tmp_path / "cut" / "validation.jsonl").open("a") as file:
        file.write('{"step": 3, "validation_loss": 9}\n{"step": 4, "valid')
    assert train(tiny_pipeline_dir, photos, tmp_path / "cut", *flags, "--resume_from_checkpoint=latest") == whole
