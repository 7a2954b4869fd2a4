"""Small Stable-Diffusion-v1-shaped pipelines with random weights, made from configurations; photos; process groups."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # tiny models: more threads only get in each other's way

UNET_CONFIG = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=16,
    attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
VAE_CONFIG = dict(
    sample_size=32,
    latent_channels=4,
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
)
TEXT_CONFIG = dict(
    vocab_size=514,
    hidden_size=16,
    intermediate_size=32,
    projection_dim=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=77,
    bos_token_id=512,
    eos_token_id=513,
    pad_token_id=513,
)
SCHEDULER_CONFIG = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
)


def write_tokenizer(folder: Path) -> None:
    """A CLIPTokenizer of bytes alone: CLIP's format without merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = dict(special, tokenizer_class="CLIPTokenizer", model_max_length=77)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_pipeline(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A complete pipeline folder without safety checker: 32 px, latents 8x8, random weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    UNet2DConditionModel(**UNET_CONFIG).to(dtype).save_pretrained(folder / "unet")
    AutoencoderKL(**VAE_CONFIG).to(dtype).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG)).to(dtype).save_pretrained(folder / "text_encoder")
    PNDMScheduler(**SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    index = dict(
        _class_name="StableDiffusionPipeline",
        _diffusers_version="0.29.0",
        feature_extractor=[None, None],
        requires_safety_checker=False,
        safety_checker=[None, None],
        scheduler=["diffusers", "PNDMScheduler"],
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
    )
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory) -> Path:
    """Never write into it: it is shared by all tests."""
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny")


def write_photos(folder: Path, count: int = 4, size: tuple[int, int] = (48, 48)) -> Path:
    """`count` JPEG photos of seeded colour noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 256, (size[1] // 8 or 1, size[0] // 8 or 1, 3), np.uint8)
        Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(folder / f"photo-{number}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory) -> Path:
    """Four square photos; never write into it."""
    return write_photos(tmp_path_factory.mktemp("photos") / "instance")
