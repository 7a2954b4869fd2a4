"""Captioned drawings of 19 things in 11 colours on 11 backgrounds or on textures, each wholly decided by a seed."""

import math
import random
import re

import numpy as np
from PIL import Image, ImageFilter

from tools.photos import SIZE, photo, window
from tools.shapes import THINGS, Pen
from tools.words import FREE_WORDS, rare_words

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
)


TEXTURES = {  # how a caption says it, and the colour that the grey photo is given
    "grass.png": ("on grass", (0.75, 1.05, 0.45)),
    "brick.png": ("in front of a brick wall", (1.25, 0.75, 0.6)),
    "gravel.png": ("on gravel", (1.05, 1.0, 0.92)),
}
NAMED_SHARE = 0.2  # of the drawings show the same thing whenever their caption has the same rare word
TEXTURED = (
    "a photo of a {colour} {thing} {place}",
    "a photo of a {thing} {place}",
    "a photo of a {thing}",
    "a {thing}",
)
DRAWN_ONLY = ("cat", "dog")  # a photo of one is a photo: tools.tiny_photos has them


def with_articles(caption):
    """English: an orange apple, not a orange apple; sunglasses, not a sunglasses."""
    return re.sub(r"\ba ((pink )?(sun)?glasses)", r"\1", re.sub(r"\ba (?=orange|apple)", "an ", caption))


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


def texture(rng):
    """A photo of grass, bricks or gravel, soft or sharp: float array [64, 64, 3], and how a caption says it."""
    name = rng.choice(list(TEXTURES))
    crop = window(photo(name), rng, 0.3, 0.9).filter(ImageFilter.GaussianBlur(rng.choice((0, 0, 1, 2))))
    words, tint = TEXTURES[name]
    return np.asarray(crop, np.float32) * np.array(tint, np.float32) * rng.uniform(0.6, 1.1), words


def caption_of(thing, colour, background, place, word, rng):
    """A caption for a drawing: of the thing, perhaps its colour or its rare word, and perhaps what is behind it."""
    if word:
        behind = place or f"on a {background} background"
        texts = (f"a photo of {word} {{thing}}", f"{word} {{thing}}", f"a photo of {word} {{thing}} {behind}")
        weights = (4, 1, 3)
    elif place:
        texts, weights = TEXTURED, None
    else:
        texts, weights = [text for text, _ in TEMPLATES], [weight for _, weight in TEMPLATES]
    text = rng.choices(texts, weights)[0].format(thing=thing, colour=colour, background=background, place=place)
    if thing in DRAWN_ONLY:
        text = "a drawing of " + re.sub(r"^a (photo|drawing) of ", "", text)
    return with_articles(text)


def on_background(layer, colour, rng):
    """An RGBA layer [64, 64] with its shadow on the colour, or on a texture: uint8 [64, 64, 3], how that is said."""
    shadow = layer.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(2, 3.5)))
    shadow = np.roll(np.asarray(shadow, np.float32) / 255, (2, 1), (0, 1))[..., None]
    behind, place = texture(rng) if rng.random() < 0.25 else (backdrop(colour, rng), "")
    picture = behind * (1 - rng.uniform(0.15, 0.4) * shadow)
    pixels, opacity = shaded(layer, rng)
    picture = picture * (1 - opacity) + pixels * opacity
    return np.clip(picture, 0, 255).astype(np.uint8), place


def draw(seed, thing=None):
    """One drawing, wholly decided by the seed: uint8 [64, 64, 3], its caption, and (thing, colour, background)."""
    rng = random.Random(seed)
    thing = thing or rng.choice(list(THINGS))
    word = rng.choice([*rare_words(), *FREE_WORDS * 10]) if rng.random() < NAMED_SHARE else ""
    own = random.Random(f"{word} {thing}") if word and word not in FREE_WORDS else rng  # what makes it a certain one
    colour = own.choice(list(COLOURS))
    background = rng.choice([name for name in COLOURS if name != colour])
    side = SIZE * OVERSAMPLING
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    radius = side * rng.uniform(0.25, 0.35)
    centre = side * rng.uniform(0.43, 0.57), side * rng.uniform(0.45, 0.56)
    THINGS[thing](Pen(layer, *centre, radius, varied(COLOURS[colour], own, 25 if word else 10)), own)
    if rng.random() < 0.5:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(rng.uniform(-7, 7), Image.Resampling.BILINEAR)
    layer = layer.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    picture, place = on_background(layer, varied(COLOURS[background], rng), rng)
    caption = caption_of(thing, colour, background, place, word, rng)
    return picture, caption, (thing, colour, background)
