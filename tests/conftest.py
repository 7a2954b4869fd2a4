"""The fixtures that several folders of tests share: a tiny base model, photos, the flags of a short run."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.pipelines import write_photos, write_pipeline
from utils.data import class_images

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # tiny models: more threads only get in each other's way


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """Where this test session keeps what it makes of single files."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DREAMBOOTH_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory) -> Path:
    """Never write into it: it is shared by all tests."""
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(tmp_path, tiny_pipeline_dir) -> Path:
    """A copy of the tiny pipeline to spoil."""
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "base")


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory) -> Path:
    """Four square photos; never write into it."""
    return write_photos(tmp_path_factory.mktemp("photos") / "instance")


@pytest.fixture
def flags(tmp_path, tiny_pipeline_dir, photos_dir) -> dict:
    """A run of 3 steps in fp32; a value of True is a flag without value, None leaves it out."""
    return dict(
        pretrained_model_name_or_path=tiny_pipeline_dir,
        instance_data_dir=photos_dir,
        output_dir=tmp_path / "output",
        instance_prompt="a photo of my cat.",
        resolution=32,
        train_batch_size=1,
        mixed_precision="no",
        learning_rate=1e-3,
        lr_warmup_steps=0,
        max_train_steps=3,
    )


@pytest.fixture
def prior(flags, tmp_path, monkeypatch) -> dict:
    """A run with 5 class images, made in 2 denoising steps."""
    monkeypatch.setattr(class_images, "NUM_INFERENCE_STEPS", 2)
    return flags | dict(
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a photo of a cat.",
        num_class_images=5,
    )
