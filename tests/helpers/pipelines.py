"""Small Stable-Diffusion-v1-shaped pipelines with random weights, made from configurations, and photos."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PARTS = ("unet", "vae", "text_encoder")
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


def write_512_pixel_pipeline(folder: Path) -> Path:
    """VAE factor 8 as Stable Diffusion's, so small that 20 steps of 512 pixels in fp16 are quick on a CPU."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    write_pipeline(folder)
    vae = dict(block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4)
    vae |= dict(up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512)
    AutoencoderKL(**VAE_CONFIG | vae).save_pretrained(folder / "vae")
    unet = dict(block_out_channels=(8, 8, 8, 8), sample_size=64)
    unet |= dict(down_block_types=("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",))
    unet |= dict(up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3)
    UNet2DConditionModel(**UNET_CONFIG | unet).save_pretrained(folder / "unet")
    return folder


def rename_vae_attention(base: Path) -> None:
    """What diffusers before 0.15 wrote: other names for the same linear layers."""
    file = base / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for name, v in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})


def write_index(base: Path) -> None:
    """The index of two shards of the UNet that are not there."""
    name = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
    weight_map = {"conv_in.weight": name.format(1), "conv_out.bias": name.format(2)}
    index = base / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))


def write_shards(base: Path, part: str = "unet", suffix: str = ".safetensors", keep: tuple[int, ...] = (1, 2)) -> None:
    """A part's weights in two shards, without an index; those that are not in `keep` are left out."""
    (file,) = (base / part).glob("*.safetensors")
    tensors = sorted(load_file(file).items())
    stem = "pytorch_model" if (suffix, part) == (".bin", "text_encoder") else file.stem
    file.unlink()
    for number in keep:
        shard = dict(tensors[number - 1 :: 2])
        path = base / part / f"{stem}-0000{number}-of-00002{suffix}"
        save_file(shard, path, {"format": "pt"}) if suffix == ".safetensors" else torch.save(shard, path)


def write_photos(folder: Path, count: int = 4, size: tuple[int, int] = (48, 48)) -> Path:
    """`count` JPEG photos of seeded colour noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 256, (size[1] // 8 or 1, size[0] // 8 or 1, 3), np.uint8)
        Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(folder / f"photo-{number}.jpg", quality=95)
    return folder


def header(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def listing(folder: Path) -> dict[str, tuple]:
    """Everything below a folder with its mode, size and time of change."""
    entries = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (found.st_mode, found.st_size, found.st_mtime_ns, found.st_ino) for name, found in entries.items()}


def edit_json(path: Path, *without: str, **entries) -> None:
    """Takes keys away, and sets others."""
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(values | entries))


def edited(part: str, **entries) -> Callable[[Path], None]:
    """What sets these in the configuration of a folder's part, or in the folder's index for the part ""."""
    return lambda base: edit_json(base / part / "config.json" if part else base / "model_index.json", **entries)


def largest_difference(images: list[Image.Image], others: list[Image.Image]) -> int:
    """Of any pixel, in grey levels of 255."""
    pairs = zip(images, others, strict=True)
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in pairs)
