"""Stable Diffusion v1.4's folder as it is published, with small weights: its names and configurations, by revision."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.encoders import write_safety_checker
from tests.helpers.pipelines import edit_json, write_pipeline

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 3438167540\n"
BIN_STEMS = {"diffusion_pytorch_model": "diffusion_pytorch_model", "model": "pytorch_model"}
PREPROCESSOR = dict(crop_size=32, do_center_crop=True, do_convert_rgb=True, do_normalize=True, do_resize=True)
PREPROCESSOR |= dict(feature_extractor_type="CLIPFeatureExtractor", resample=3, size=32)
PREPROCESSOR |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])


def write_main(folder: Path) -> Path:
    """The main branch of 2023-08: of every part plain and fp16 weights, of the UNet non_ema too, each in both formats.

    Variants that are not to be read are zeros.
    """
    write_safety_checker(write_pipeline(folder))
    edit_json(folder / "model_index.json", "requires_safety_checker", _diffusers_version="0.2.2")
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    for part in ("unet", "vae"):
        edit_json(folder / part / "config.json", _diffusers_version="0.2.2")
    edit_json(folder / "vae/config.json", "scaling_factor", "force_upcast", "_name_or_path")
    left = dict(name_or_path="openai/clip-vit-large-patch14", special_tokens_map_file="./special_tokens_map.json")
    edit_json(folder / "tokenizer/tokenizer_config.json", **left)
    hidden = folder / "scheduler/.ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(folder / "scheduler/scheduler_config.json", hidden / "scheduler_config-checkpoint.json")
    (folder / ".gitattributes").write_text("*.bin filter=lfs diff=lfs merge=lfs -text\n")
    for file in folder.glob("*/*.safetensors"):
        tensors = load_file(file)
        for variant in ("", ".fp16", *([".non_ema"] if file.parent.name == "unet" else [])):
            values = {name: value * 0 if variant else value for name, value in tensors.items()}
            values = {name: value.half() for name, value in values.items()} if variant == ".fp16" else values
            save_file(values, file.with_name(f"{file.stem}{variant}.safetensors"), {"format": "pt"})
            torch.save(values, file.with_name(f"{BIN_STEMS[file.stem]}{variant}.bin"))
    return folder


def keep(folder: Path, ending: str, plain: bool = False) -> None:
    """Of the weights those with that ending alone, in fp16 their real values; `plain` gives them the plain name."""
    for file in [path for path in folder.glob("*/*") if path.suffix in (".bin", ".safetensors")]:
        stem, _, rest = file.name.partition(".")
        if f".{rest}" != ending:
            file.unlink()
        elif plain:
            file.rename(file.with_name(f"{stem}{file.suffix}"))


def fill_fp16(folder: Path) -> None:
    for file in folder.glob("*/*.fp16.*"):
        (plain,) = file.parent.glob("*model.safetensors")
        values = {name: value.half() for name, value in load_file(plain).items()}
        save_file(values, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(values, file)


def make_pointers(folder: Path, pattern: str) -> None:
    """What git-lfs leaves of files that it has not fetched."""
    for file in folder.glob(pattern):
        file.write_text(POINTER.format("0" * 64))


def first_commit(folder: Path) -> None:
    keep(folder, ".bin")
    edit_json(folder / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    edit_json(folder / "scheduler/scheduler_config.json", "steps_offset", "prediction_type", "timestep_spacing")


def fp16_branch(folder: Path) -> None:
    fill_fp16(folder)
    keep(folder, ".fp16.bin", plain=True)


def fp16_pulled(folder: Path) -> None:
    fill_fp16(folder)
    for file in [path for path in folder.glob("*/*") if path.suffix in (".bin", ".safetensors")]:
        if ".fp16.safetensors" not in file.name:
            make_pointers(folder, f"{file.parent.name}/{file.name}")


def flax(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        file.with_name(f"{file.stem.replace('pytorch', 'flax')}.msgpack").write_bytes(b"\x81\xa1a")
    keep(folder, "none")


def onnx(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="OnnxStableDiffusionPipeline")
    edit_json(folder / "model_index.json", **{part: ["diffusers", "OnnxRuntimeModel"] for part in ("unet", "vae")})
    for file in folder.glob("*/*.safetensors"):
        file.with_name("model.onnx").write_bytes(b"\x08\x07")
    keep(folder, "none")


def no_checker_weights(folder: Path) -> None:
    for file in folder.glob("safety_checker/*model*"):
        file.unlink()


# {revision, or how much of it was fetched: what is different from the main branch}
REVISIONS = {
    "main": lambda folder: None,
    "hf download": lambda folder: keep(folder, ".safetensors"),
    "first commit": first_commit,
    "fp16 branch": fp16_branch,
    "non-ema branch": lambda folder: keep(folder, ".bin"),
    "fp16 pulled": fp16_pulled,
    "bin pulled": lambda folder: make_pointers(folder, "*/*.safetensors"),
    "checker's pointers": lambda folder: make_pointers(folder, "safety_checker/*model*"),
    "checker's configuration alone": no_checker_weights,
}
REFUSED = {"flax": flax, "onnx": onnx}
