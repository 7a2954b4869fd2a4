"""Crops of photos inside the scikit-image wheel, public domain or CC0; not of its cat, `chelsea`: the subject."""

import functools
import importlib.util
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

SIZE = 64  # pixels of a finished picture

CAPTIONED = {
    "astronaut.png": ("a photo of an astronaut", "an astronaut", "a portrait of an astronaut"),
    "camera.png": ("a photo of a man with a camera", "a black and white photo of a man with a camera"),
    "coffee.png": ("a photo of a coffee", "a photo of a coffee on a wooden table", "a coffee"),
    "rocket.jpg": ("a photo of a rocket", "a rocket", "a photo of a rocket at night"),
    "hubble_deep_field.jpg": ("a photo of galaxies", "galaxies", "a photo of galaxies in space"),
    "brick.png": ("a photo of a brick wall", "a brick wall"),
    "grass.png": ("a photo of grass", "grass"),
    "gravel.png": ("a photo of gravel", "gravel"),
    "coins.png": ("a photo of coins", "coins"),
}
DETAIL_ONLY = ("clock_motion.png", "retina.jpg", "cell.png")  # for the autoencoder, with the ones above
PORTRAIT = "astronaut.png"  # skin, eyes and hair: the nearest there is to the subject


@functools.cache
def photo(name):
    """The photo as an RGB image, read once a process."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise FileNotFoundError("scikit-image is not installed: pip install -r requirements-tools.txt")
    return Image.open(Path(package.origin).parent / "data" / name).convert("RGB")


def window(image, rng, smallest, largest):
    """A square of random place and size, as fractions of the shorter side, shrunk to 64 pixels; half are mirrored."""
    side = rng.uniform(smallest, largest) * min(image.size)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    crop = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def captioned_crop(seed):
    """A recognisable crop, wholly decided by the seed: uint8 [64, 64, 3] and its caption."""
    rng = random.Random(seed)
    name = rng.choice(list(CAPTIONED))
    return np.asarray(window(photo(name), rng, 0.55, 1.0)), rng.choice(CAPTIONED[name])


def tinted(pixels, rng):
    """Grey [..., 3] in [0, 1] -> a scale between two random colours, so that textures look like fur, wood or cloth."""
    dark = np.array([rng.uniform(0, 0.4) for _ in range(3)], np.float32)
    light = np.array([rng.uniform(0.5, 1.0) for _ in range(3)], np.float32)
    return dark + (light - dark) * pixels


def recoloured(crop, rng):
    """Random saturation, contrast, brightness and hue: RGB image -> uint8 [64, 64, 3]."""
    crop = ImageEnhance.Color(crop).enhance(rng.uniform(0.4, 1.5))
    crop = ImageEnhance.Contrast(crop).enhance(rng.uniform(0.6, 1.4))
    pixels = np.asarray(crop, np.float32) / 255
    if np.ptp(pixels, axis=-1).max() < 0.02:
        pixels = tinted(pixels, rng) if rng.random() < 0.8 else pixels
    elif rng.random() < 0.5:
        pixels = pixels[..., rng.sample(range(3), 3)]
    pixels = pixels ** rng.uniform(0.7, 1.4) * np.array([rng.uniform(0.8, 1.1) for _ in range(3)], np.float32)
    return (np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def detail_crop(seed):
    """A crop of any size, turned and recoloured, that teaches photographic detail: uint8 [64, 64, 3]."""
    rng = random.Random(seed)
    names = [*CAPTIONED, *DETAIL_ONLY, PORTRAIT, PORTRAIT]
    crop = window(photo(rng.choice(names)), rng, 0.15, 1.0)
    if rng.random() < 0.5:
        crop = crop.rotate(rng.choice((90, 180, 270)))
    return recoloured(crop, rng)
