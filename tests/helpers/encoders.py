"""Tiny CLIP, DINO and safety-checker folders with random weights, from configurations."""

import json
from pathlib import Path

import torch

from tests.helpers.pipelines import TEXT_CONFIG, edit_json, write_tokenizer

INDEX_OF_CHECKER = dict(
    feature_extractor=["transformers", "CLIPImageProcessor"],
    safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
)
VISION_CONFIG = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)


def clip_config():
    from transformers import CLIPConfig

    return CLIPConfig(text_config=TEXT_CONFIG, vision_config=dict(VISION_CONFIG, projection_dim=16), projection_dim=16)


def write_clip(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPModel

    torch.manual_seed(seed)
    CLIPModel(clip_config()).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_dino(folder: Path, seed: int = 0) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    ViTModel(ViTConfig(**VISION_CONFIG), add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_safety_checker(pipeline_folder: Path, seed: int = 0) -> Path:
    """safety_checker/ and feature_extractor/ below `pipeline_folder`, named in its index if it has one."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(seed)
    StableDiffusionSafetyChecker(clip_config()).save_pretrained(pipeline_folder / "safety_checker")
    processor = pipeline_folder / "feature_extractor" / "preprocessor_config.json"
    processor.parent.mkdir(parents=True)
    size = dict(size=dict(shortest_edge=32), crop_size=32)
    processor.write_text(json.dumps(dict(image_processor_type="CLIPImageProcessor", **size)))
    if (index := pipeline_folder / "model_index.json").exists():
        edit_json(index, **INDEX_OF_CHECKER)
    return pipeline_folder
