"""Feature extractors for the metrics: images and texts to unit vectors, by transforms that are fixed here."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.runtime.libraries import quiet_libraries

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection, ViTModel

from utils.errors import UserError
from utils.evaluation.metrics import unit_rows
from utils.files.hashing import sha256_of
from utils.files.json_files import read_json
from utils.models.folder import find_weights
from utils.models.loading import load_safety_checker as load_checker
from utils.runtime.process import progress_bar

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_RESIZE_OVER_CROP = 256 / 224
BATCH_SIZE = 16


class Transform(NamedTuple):
    """Shorter side to `resize` pixels (Pillow, bicubic, antialiased, 8 bits), centre crop,
    then (x / 255 - mean) / std."""

    resize: int
    centre_crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """[3,crop,crop] float32 of an RGB image."""
        width, height = image.size
        shorter, crop = min(width, height), self.centre_crop
        size = (width * self.resize // shorter, height * self.resize // shorter)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
        values = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / np.float32(255)
        normalised = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))


class Encoder(NamedTuple):
    """A model that turns images into vectors, and texts too if it has a text tower."""

    name: str
    folder: Path
    weights: tuple[Path, ...]
    transform: Transform
    image_features: Callable[[torch.Tensor], torch.Tensor]
    text_features: Callable[[list[str]], torch.Tensor] | None = None

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors [N,D] of RGB images."""
        rows = []
        with progress_bar(f"scoring, {self.name}", len(images), "image", shown=len(images) > BATCH_SIZE) as bar:
            for start in range(0, len(images), BATCH_SIZE):
                pixels = [self.transform(image) for image in images[start : start + BATCH_SIZE]]
                rows.append(self.image_features(torch.from_numpy(np.stack(pixels))).double().cpu().numpy())
                bar.update(len(pixels))
        return self._unit_rows(np.concatenate(rows), "images")

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [N,D] of texts, if it reads."""
        assert self.text_features is not None
        return self._unit_rows(self.text_features(texts).double().cpu().numpy(), "texts")

    def _unit_rows(self, rows: np.ndarray, what: str) -> np.ndarray:
        """The rows scaled to length 1. Raises UserError if they are no numbers, or zero: they have no direction."""
        if not (np.isfinite(rows).all() and np.any(rows, axis=1).all()):
            raise UserError(f"{self.folder}: its features of {what} are not numbers, or zero: copy the folder again")
        return unit_rows(rows)

    def description(self) -> dict:
        """What metrics.json records."""
        return dict(
            name=self.name,
            folder=str(self.folder),
            sha256={str(path.relative_to(self.folder)): _hash(path) for path in self.weights},
            transform=self.transform._asdict(),
        )


_hash = functools.cache(sha256_of)


def _weights(folder: Path) -> tuple[Path, ...]:
    """The weight files, also those that an index names: .safetensors if there are any, else .bin."""
    for ending in ("safetensors", "bin"):
        maps = [read_json(path).get("weight_map", {}) for path in folder.glob(f"*.{ending}.index.json")]
        named = {folder / name for weight_map in maps for name in weight_map.values()}
        if files := [path for path in sorted({*folder.glob(f"*.{ending}"), *named}) if path.is_file()]:
            return tuple(files)
    return ()


def load_clip(folder: Path, device: torch.device) -> Encoder:
    """A CLIPModel folder (openai/clip-vit-base-patch32, say): both towers with their projections."""
    _check_kind(folder, "--clip_model", "clip", "a CLIP model such as openai/clip-vit-base-patch32")
    vision = _load_model(CLIPVisionModelWithProjection, folder, device)
    text = _load_model(CLIPTextModelWithProjection, folder, device)
    tokenizer = _load(CLIPTokenizer, folder)
    size = vision.config.image_size

    def text_features(texts: list[str]) -> torch.Tensor:
        length = text.config.max_position_embeddings
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text(input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)).text_embeds

    return Encoder(
        f"CLIP ({folder.resolve().name})",
        folder,
        _weights(folder),
        Transform(size, size, CLIP_MEAN, CLIP_STD),
        lambda pixels: vision(pixel_values=pixels.to(device)).image_embeds,
        text_features,
    )


def load_safety_checker(pipeline_folder: Path, device: torch.device) -> Encoder:
    """The image tower in a pipeline's safety_checker/: CLIP ViT-L/14's in Stable Diffusion v1.4. It knows no text."""
    folder = pipeline_folder / "safety_checker"
    checker: Any = load_checker(pipeline_folder, device)
    size = checker.config.vision_config.image_size
    return Encoder(
        f"CLIP image tower of {pipeline_folder.resolve().name}/safety_checker",
        folder,
        tuple(find_weights(pipeline_folder, "safety_checker").files),
        Transform(size, size, CLIP_MEAN, CLIP_STD),
        lambda pixels: checker.visual_projection(checker.vision_model(pixels.to(device))[1]),
    )


def load_dino(folder: Path, device: torch.device) -> Encoder:
    """A ViTModel folder (facebook/dino-vits16): the class token after the last layer norm."""
    _check_kind(folder, "--dino_model", "vit", "a DINO model such as facebook/dino-vits16")
    model = _load_model(ViTModel, folder, device, add_pooling_layer=False)
    crop = model.config.image_size
    return Encoder(
        f"DINO ({folder.resolve().name})",
        folder,
        _weights(folder),
        Transform(round(crop * DINO_RESIZE_OVER_CROP), crop, IMAGENET_MEAN, IMAGENET_STD),
        lambda pixels: model(pixel_values=pixels.to(device)).last_hidden_state[:, 0],
    )


def _load_model(cls: Any, folder: Path, device: torch.device, **options: Any) -> Any:
    """The model in fp32, frozen. UserError if weights are lacking: the library would fill them in at random."""
    model, loading = _load(cls, folder, output_loading_info=True, **options)
    missing = sorted(name for name in loading["missing_keys"] if "position_ids" not in name)
    if missing:
        raise UserError(f"{folder}: the weights lack {len(missing)} tensors of a {cls.__name__}, {missing[0]} first")
    return model.requires_grad_(False).eval().to(device, torch.float32)


def _load(cls: Any, folder: Path, **options: Any) -> Any:
    try:
        with quiet_libraries():
            return cls.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # a damaged folder fails in many ways, and every one is about the folder
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} cannot be loaded as a {cls.__name__} ({reason}): copy the folder again") from error


def _check_kind(folder: Path, flag: str, model_type: str, wanted: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{flag} {folder} has no config.json: name the folder of {wanted}")
    found = read_json(config).get("model_type")
    if found != model_type:
        raise UserError(f"{flag} {folder} is a {found} model: name the folder of {wanted}")
