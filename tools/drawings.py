"""Captioned drawings of 16 things in 11 colours on 11 backgrounds, each wholly decided by a seed."""

import math
import random
import re

import numpy as np
from PIL import Image, ImageFilter

from tools.shapes import THINGS, Pen

SIZE = 64  # pixels of the finished picture
OVERSAMPLING = 3  # drawn this many times larger, then shrunk: smooth edges
COLOURS = {
    "red": (208, 48, 44),
    "orange": (236, 136, 40),
    "yellow": (236, 204, 62),
    "green": (62, 152, 72),
    "blue": (48, 92, 206),
    "purple": (132, 68, 176),
    "pink": (242, 150, 184),
    "brown": (122, 80, 48),
    "gray": (138, 138, 144),
    "white": (242, 242, 240),
    "black": (36, 36, 42),
}
TEMPLATES = (  # caption, weight; a subject's prompt ("my", "sks") is known as a phrase before its photos are
    ("a photo of a {colour} {thing} on a {background} background", 6),
    ("a photo of a {colour} {thing}", 4),
    ("a {colour} {thing} on a {background} background", 3),
    ("a photo of a {thing}", 4),
    ("a photo of a {thing} on a {background} background", 2),
    ("a {thing} on a {background} background", 1),
    ("a {thing}", 2),
    ("a {colour} {thing}", 2),
    ("a drawing of a {thing}", 1),
    ("a drawing of a {colour} {thing}", 1),
    ("a photo of my {thing}.", 1),
    ("a photo of my {colour} {thing}.", 1),
    ("a photo of my {thing} on a {background} background", 0.5),
    ("a photo of a sks {thing}", 0.5),
)


def with_articles(caption):
    """English: an orange apple, not a orange apple."""
    return re.sub(r"\ba (?=orange|apple)", "an ", caption)


def varied(colour, rng, amount=10):
    """The colour moved a little: brighter or darker, and each channel by itself."""
    shift = rng.uniform(-amount, amount)
    return tuple(int(min(255, max(0, value + shift + rng.uniform(-amount, amount) / 2))) for value in colour)


def backdrop(colour, rng):
    """A soft gradient around the colour, sometimes with a floor: float array [64, 64, 3]."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(6, 20)
    shade = strength * (x * math.cos(angle) + y * math.sin(angle))
    if rng.random() < 0.3:
        shade = shade + np.where(y > rng.uniform(0.35, 0.6), -rng.uniform(10, 18), 0)
    return np.asarray(colour, np.float32) + shade[..., None]


def shaded(thing, rng):
    """Light from above left on an RGBA layer: colour [64, 64, 3] and opacity [64, 64, 1] in [0, 1]."""
    pixels = np.asarray(thing, np.float32)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    light = rng.uniform(6, 22) * (-0.6 * x - 0.8 * y)
    return pixels[..., :3] + light[..., None], pixels[..., 3:] / 255


def draw(seed, thing=None):
    """One drawing, wholly decided by the seed: uint8 [64, 64, 3], its caption, and (thing, colour, background)."""
    rng = random.Random(seed)
    thing = thing or rng.choice(list(THINGS))
    colour = rng.choice(list(COLOURS))
    background = rng.choice([name for name in COLOURS if name != colour])
    side = SIZE * OVERSAMPLING
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    radius = side * rng.uniform(0.25, 0.35)
    centre = side * rng.uniform(0.43, 0.57), side * rng.uniform(0.45, 0.56)
    THINGS[thing](Pen(layer, *centre, radius, varied(COLOURS[colour], rng)), rng)
    if rng.random() < 0.5:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(rng.uniform(-7, 7), Image.Resampling.BILINEAR)
    layer = layer.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    shadow = layer.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(2, 3.5)))
    shadow = np.roll(np.asarray(shadow, np.float32) / 255, (2, 1), (0, 1))[..., None]
    picture = backdrop(varied(COLOURS[background], rng), rng) * (1 - rng.uniform(0.15, 0.4) * shadow)
    pixels, opacity = shaded(layer, rng)
    picture = picture * (1 - opacity) + pixels * opacity
    template = rng.choices([text for text, _ in TEMPLATES], [weight for _, weight in TEMPLATES])[0]
    caption = with_articles(template.format(thing=thing, colour=colour, background=background))
    return np.clip(picture, 0, 255).astype(np.uint8), caption, (thing, colour, background)
