"""Prior preservation's class images: which there are, which are missing, and the dataset of those that are used.

The base model draws them (Ruiz et al. 2023, section 3.2). Each file is a PNG that names in its own metadata the
settings and the seed it was made with, so that a run that was killed goes on where it stopped. Images made with other
settings are never mixed in.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from utils.concepts import Concept
from utils.dataset import crop_origin, decode, find_photos, resize_shorter_side
from utils.errors import UserError
from utils.preflight import read_json

if TYPE_CHECKING:
    import torch

METADATA_KEY = "dreambooth_class_image"
NUM_INFERENCE_STEPS = 50
GUIDANCE_SCALE = 7.5
MODEL_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PNG_END = b"IEND\xaeB`\x82"


class ClassPlan(NamedTuple):
    """What becomes of one class: `num_found` are there, `missing` are made, `used` are trained on."""

    folder: Path
    prompt: str
    settings: dict
    num_found: int
    missing: list[int]
    used: list[Path]
    notes: list[str]

    def summary(self, num_ranks: int, batch_size: int) -> str:
        """Have, need, will make, will use."""
        spread = f" ({num_ranks} ranks, {batch_size} at a time)" if self.missing else ""
        lines = [
            f"class images {self.prompt!r} in {self.folder}: have {self.num_found}, need {len(self.used)}, "
            f"will make {len(self.missing)}{spread}, will use {len(self.used)}"
        ]
        return "\n".join(lines + self.notes)


def file_name(number: int) -> str:
    """Of class image `number`."""
    return f"class-{number:05d}.png"


def model_hash(base_hashes: dict[str, str]) -> str:
    """One hash of those of the base's files that drawing an image reads, from {path in the folder: SHA-256}."""
    digest = hashlib.sha256()
    for part in MODEL_PARTS:
        for name in sorted(name for name in base_hashes if name.startswith(f"{part}/")):
            if not name.startswith(f"{part}/."):
                digest.update(f"{name} {base_hashes[name]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def generation_settings(folder: Path, model: str, prompt: str) -> dict:
    """Everything but the seed that decides what a class image shows; images of equal settings may be mixed."""
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    factor = 2 ** (len(vae.get("block_out_channels", [64])) - 1)
    size = unet.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    return dict(
        prompt=prompt,
        model=model,
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name"),
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        height=height * factor,
        width=width * factor,
    )


def plan_class_images(concept: Concept, settings: dict, num_class_images: int) -> ClassPlan:
    """What is there and what has to be made; reads headers only, writes nothing.

    Raises UserError where the folder holds images of another prompt or model, or too few of unknown origin.
    """
    folder = concept.class_data_dir
    found, foreign = set(), []
    for path in find_photos(folder, "--class_data_dir", may_be_empty=True)[0] if folder.is_dir() else []:
        metadata = read_metadata(path)
        if metadata is None:
            foreign.append(path)
            continue
        _check_settings(folder, metadata["settings"], settings)
        found.add(metadata["number"])
    return _choose(concept, settings, num_class_images, found, foreign)


def _choose(concept: Concept, settings: dict, need: int, found: set[int], foreign: list[Path]) -> ClassPlan:
    folder, prompt = concept.class_data_dir, concept.class_prompt
    if foreign and not found:
        if len(foreign) < need:
            raise UserError(
                f"--class_data_dir {folder} holds {len(foreign)} images that this program did not make, and "
                f"--num_class_images asks for {need}; made ones are not mixed with others: give "
                f"--num_class_images {len(foreign)} to train on those, or name an empty folder"
            )
        note = f"this program did not make the images in {folder}: they are taken as {prompt!r}"
        return ClassPlan(folder, prompt, settings, len(foreign), [], foreign[:need], [note])
    absent = (number for number in itertools.count() if number not in found)
    missing = list(itertools.islice(absent, max(0, need - len(found))))
    used = [folder / file_name(number) for number in sorted([*found, *missing])[:need]]
    notes = [f"left out: {len(foreign)} images in {folder} that this program did not make"] if foreign else []
    return ClassPlan(folder, prompt, settings, len(found), missing, used, notes)


def _check_settings(folder: Path, theirs: dict, ours: dict) -> None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UserError(
                f"--class_data_dir {folder} holds images made with another {name.replace('_', ' ')}, "
                f"{theirs.get(name)!r}, not {value!r}; name another folder, or empty this one"
            )


def read_metadata(path: Path) -> dict | None:
    """What a class image of this program says of itself: settings, number, seed.

    None for any other image, and for one that is cut short or has another name than it was given.
    """
    if path.suffix != ".png":
        return None
    try:
        with Image.open(path) as image:
            metadata = json.loads(image.info[METADATA_KEY])
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            whole = file.read() == PNG_END
        named = path.name == file_name(metadata["number"])
        return metadata if whole and named and {"settings", "seed"} <= metadata.keys() else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def check_used(plan: ClassPlan) -> None:
    """Raises UserError where this rank cannot see an image that is to be used."""
    absent = [path for path in plan.used if not path.is_file()]
    if absent:
        raise UserError(
            f"--class_data_dir {plan.folder}: {len(absent)} of {len(plan.used)} class images cannot be seen from "
            f"every rank, {absent[0].name} first; it has to be one folder that all nodes share"
        )


class ClassDataset:
    """The class images that are used, decoded when they are asked for; an InstanceDataset to whoever draws crops.

    Args:
        plans: one per class; their images follow each other.
        resolution: side R of the square crops in pixels.
        center_crop: crop the middle instead of a random place.
    """

    def __init__(self, plans: list[ClassPlan], resolution: int, center_crop: bool = False):
        self.resolution = resolution
        self.center_crop = center_crop
        self.images = [(path, plan.prompt) for plan in plans for path in plan.used]
        self.sizes = [self._resized_size(path) for path, _ in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def _resized_size(self, path: Path) -> tuple[int, int]:
        """(height, width) after upright turning and resizing, from the file's header."""
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # orientations that exchange width and height
                width, height = height, width
        shorter = min(width, height)
        return self.resolution * height // shorter, self.resolution * width // shorter

    def record(self) -> list[dict]:
        """For run.json: each class's folder, prompt and number of images."""
        counts = Counter((path.parent, prompt) for path, prompt in self.images)
        return [dict(folder=str(folder), prompt=prompt, num_used=n) for (folder, prompt), n in counts.items()]

    def prompt(self, photo: int) -> str:
        """The class prompt of image number `photo`."""
        return self.images[photo][1]

    def crop_origin(self, photo: int, position: tuple[float, float]) -> tuple[int, int]:
        """(top, left) in pixels of the crop of image number `photo`; `position` is two numbers in [0,1)."""
        return crop_origin(self.sizes[photo], self.resolution, self.center_crop, position)

    @property
    def has_fixed_crops(self) -> bool:
        """Whether every image has one crop only."""
        return self.center_crop or all(height == width for height, width in self.sizes)

    def pixel_values(self, photo: int, top: int, left: int) -> "torch.Tensor":
        """float32 [3,R,R] in [-1,1]."""
        import torch

        image = resize_shorter_side(decode(self.images[photo][0]), self.resolution)
        pixels = np.array(image)[top : top + self.resolution, left : left + self.resolution]
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0
