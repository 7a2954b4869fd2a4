"""CLIP-I by the embedded tiny-clip: do a model's images of a prompt look like these photos?"""

from pathlib import Path

import torch

from tests.helpers.script import ROOT
from utils.dataset import decode, find_photos
from utils.evaluation.encoders import load_clip
from utils.evaluation.metrics import photo_similarity
from utils.models.drawing import sample
from utils.models.folder import read_base
from utils.models.loading import load_pipeline

CPU = torch.device("cpu")


def likeness(model: Path, photos: dict[str, Path]) -> list[float]:
    """For each prompt, of 4 images against the photos in its folder."""
    clip, pipeline, found = (
        load_clip(ROOT / "model" / "tiny-clip", CPU),
        load_pipeline(read_base(model), torch.float32, CPU),
        [],
    )
    for prompt, folder in photos.items():
        images = clip.images(sample(pipeline, prompt, [0, 1, 2, 3], num_inference_steps=15))
        shown = clip.images([decode(path) for path in find_photos(folder)[0]])
        found.append(float(photo_similarity(images, shown).mean()))
    return found
