"""Base folders as people have them: each trains as the same weights do in a folder of today, and its result loads."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.helpers.pipelines import PARTS, edit_json, rename_vae_attention, write_index, write_shards
from tests.helpers.script import SHORT, run
from utils.models.folder import read_base
from utils.models.loading import load_pipeline


def weight_file(base: Path, part: str) -> Path:
    return next((base / part).glob("*.safetensors"))


def old_versions(base: Path) -> None:
    edit_json(base / "model_index.json", _diffusers_version="0.2.2")
    for part in ("unet", "vae"):
        edit_json(base / part / "config.json", _diffusers_version="0.2.2", _name_or_path="/somewhere/else")
    old = dict(clip_sample=False, _diffusers_version="0.8.0", skip_prk_steps=True)
    edit_json(base / "scheduler/scheduler_config.json", "prediction_type", "timestep_spacing", "trained_betas", **old)


def non_ema_alone(base: Path) -> None:
    for part in PARTS:
        file = weight_file(base, part)
        file.rename(file.with_name(f"{file.stem}.non_ema.safetensors"))


def half_precision_in_the_configurations(base: Path) -> None:
    for part in PARTS:
        edit_json(base / part / "config.json", torch_dtype="float16")
    edit_json(base / "text_encoder/config.json", dtype="float16")  # as transformers 5 calls it


NO_CHECKER = ("safety_checker", "feature_extractor", "requires_safety_checker")
KINDS = {
    "shards without an index": lambda b: [write_shards(b, part) for part in PARTS],
    "bin shards of the text encoder": lambda b: write_shards(b, "text_encoder", ".bin"),
    "a stale index": write_index,
    "non_ema alone": non_ema_alone,
    "image to image": lambda b: edit_json(b / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline"),
    "half precision in the configurations": half_precision_in_the_configurations,
    "no length": lambda b: edit_json(b / "tokenizer/tokenizer_config.json", "model_max_length"),
    "no scaling factor": lambda b: edit_json(b / "vae/config.json", "scaling_factor", "force_upcast"),
    "old names of the VAE": rename_vae_attention,
    "index without safety checker": lambda b: edit_json(b / "model_index.json", *NO_CHECKER),
    "old versions": old_versions,
}


def loss_and_result(base: Path, photos: Path, output: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step, and the weights of the UNet that the finished pipeline loads."""
    flags = SHORT | dict(pretrained_model_name_or_path=base, instance_data_dir=photos, output_dir=output)
    (row,) = run(flags, max_train_steps=1)
    StableDiffusionPipeline.from_pretrained(output)  # as a user would
    assert json.loads((output / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    pipeline = load_pipeline(read_base(output), torch.float32, torch.device("cpu"))
    return row["loss"], pipeline.unet.state_dict()


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tiny_pipeline_dir, photos_dir) -> tuple[float, dict[str, torch.Tensor]]:
    return loss_and_result(tiny_pipeline_dir, photos_dir, tmp_path_factory.mktemp("expected") / "output")


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_the_plain_folder_does(base, tmp_path, photos_dir, expected, kind):
    KINDS[kind](base)
    loss, unet = loss_and_result(base, photos_dir, tmp_path / "output")
    assert loss == expected[0]
    assert all(torch.equal(unet[name], value) for name, value in expected[1].items())
