"""Captioned crops of photos, by the hundred on a GPU. photo_boxes.txt says where the subjects are, and whose photos.

world = PhotoWorld(Path("photos"), device)  # photos/cats/*.jpg, photos/objects/*/*.jpg
pixels, captions = world.batch(np.random.default_rng(0), 512)
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from tools.drawings import COLOURS, SIZE, with_articles
from tools.words import RARE_SHARE, Words

BOXES = Path(__file__).with_name("photo_boxes.txt")
CANVAS = 344  # pixels; photos are mirrored outwards to a square of this side
SMALLEST = 48  # pixels of a photo that a crop shows at least
WITH_WORD = (("a photo of {word} {thing}", 5), ("a photo of a {word} {thing}", 1), ("{word} {thing}", 1))
PLAIN = (
    ("a photo of a {thing}", 5),
    ("a photo of a {colour} {thing}", 2),
    ("a {colour} {thing}", 1),
    ("a {thing}", 1),
    ("a photo of my {thing}.", 2),
)
OTHER_WORDS = {
    "sneaker": ("sneaker", "sneaker", "shoe"),
    "boot": ("boot", "boot", "shoe"),
    "stuffed animal": ("stuffed animal", "stuffed animal", "toy", "plush toy"),
    "sunglasses": ("sunglasses", "sunglasses", "glasses"),
}
OF_HEADS = (("a close photo of a {thing}", 3), ("a close photo of a {colour} {thing}", 1))


@dataclasses.dataclass(frozen=True)
class View:
    """What can be cropped: a subject, or its head; `box` is left, top, right, bottom as fractions of the photo."""

    photo: int
    weight: int
    subject: str
    colour: str
    thing: str
    box: tuple
    is_head: bool


def read_boxes(path=BOXES):
    """photo_boxes.txt -> a list of (photo, weight, subject, colour and class, boxes as fractions)."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            photo, weight, *rest = (field.strip() for field in line.split(";"))
            subject, words = rest[:2] or ("", "")
            boxes = [tuple(float(number) for number in box.split()) for box in rest[2:]]
            rows.append((photo, int(weight), subject, words, boxes))
    return rows


def called(thing, chance):
    """One of the words for a class; chance is in [0, 1)."""
    words = OTHER_WORDS.get(thing, (thing,))
    return words[int(chance * len(words))]


def on_canvas(path):
    """A photo in the middle of a canvas that mirrors it: uint8 [CANVAS, CANVAS, 3], and left, top, right, bottom."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((CANVAS, CANVAS), Image.Resampling.LANCZOS)
    left, top = (CANVAS - image.width) // 2, (CANVAS - image.height) // 2
    right, bottom = left + image.width, top + image.height
    margins = ((top, CANVAS - bottom), (left, CANVAS - right), (0, 0))
    return np.pad(np.asarray(image), margins, mode="reflect"), (left, top, right, bottom)


def views(row, photo):
    """What a row of photo_boxes.txt offers."""
    _, weight, subject, words, boxes = row
    first, _, rest = words.partition(" ")
    colour, thing = (first, rest) if first in COLOURS else ("", words)
    return [View(photo, weight, subject, colour, thing, box, is_head=index > 0) for index, box in enumerate(boxes)]


def shares(weights):
    return np.array(weights, np.float64) / sum(weights)


class PhotoWorld:
    """Photos on a device, and crops of them."""

    def __init__(self, folder, device="cpu", boxes=BOXES):
        self.device = torch.device(device)
        rows = read_boxes(boxes)
        canvases, places = zip(*(on_canvas(folder / row[0]) for row in rows), strict=True)
        self.canvases = torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2).contiguous().to(self.device)
        self.places = np.array(places, np.float64)
        self.views = [view for index, row in enumerate(rows) for view in views(row, index)]
        fractions = np.array([view.box for view in self.views])
        corner, far = np.split(self.places[[view.photo for view in self.views]], 2, axis=1)
        self.boxes = np.tile(corner, 2) + fractions * np.tile(far - corner, 2)  # pixels of the canvas
        self.weights = shares([view.weight for view in self.views])
        self.photo_weights = shares([0.3 + row[1] for row in rows])
        self.words = Words(view.subject for view in self.views)

    def batch(self, rng, n, rare=True):
        """Crops around subjects and heads: uint8 [n, 64, 64, 3] on the device, and n captions."""
        chosen = rng.choice(len(self.views), n, p=self.weights)
        photos = np.array([self.views[index].photo for index in chosen])
        box = self.boxes[chosen]
        extent = (box[:, 2:] - box[:, :2]).max(1)
        margin = rng.uniform(0, 0.4, n)
        centres = (box[:, 2:] + box[:, :2]) / 2
        centres += rng.uniform(-1, 1, (n, 2)) * (extent * (0.08 + margin / 2))[:, None]
        pixels = self.crops(rng, photos, centres, extent * (1 + margin), degrees=8)
        return recoloured(pixels, rng, 0.15), [self.caption(rng, self.views[index], rare) for index in chosen]

    def details(self, rng, n):
        """Windows of any place and size, turned and recoloured, for the autoencoder: uint8 [n, 64, 64, 3]."""
        photos = rng.choice(len(self.places), n, p=self.photo_weights)
        place = self.places[photos]
        centres = rng.uniform(place[:, :2], place[:, 2:])
        sides = rng.uniform(0.3, 1, n) * (place[:, 2:] - place[:, :2]).min(1)
        return recoloured(self.crops(rng, photos, centres, sides, degrees=25), rng, 0.4)

    def crops(self, rng, photos, centres, sides, degrees):
        """Squares of `sides` pixels about `centres`, moved into their photos, half mirrored: float [n, 3, 64, 64]."""
        place = self.places[photos]
        sides = np.clip(sides, SMALLEST, (place[:, 2:] - place[:, :2]).min(1))
        centres = np.clip(centres, place[:, :2] + sides[:, None] / 2, place[:, 2:] - sides[:, None] / 2)
        angles = np.radians(rng.uniform(-degrees, degrees, len(photos)))
        cos, sin = np.cos(angles) * sides / CANVAS, np.sin(angles) * sides / CANVAS
        mirror = rng.choice((-1, 1), len(photos))
        x, y = (centres * 2 / CANVAS - 1).T
        maps = np.stack([np.stack([cos * mirror, -sin, x], 1), np.stack([sin * mirror, cos, y], 1)], 1)
        maps = torch.from_numpy(maps).float().to(self.device)
        # twice as many samples as pixels, then their means: a bilinear sample by itself skips pixels when it shrinks
        grid = F.affine_grid(maps, [len(photos), 3, 2 * SIZE, 2 * SIZE], align_corners=False)
        sources = self.canvases[torch.from_numpy(photos).to(self.device)].float()
        return F.avg_pool2d(F.grid_sample(sources, grid, padding_mode="reflection", align_corners=False), 2)

    def caption(self, rng, view, rare):
        templates = PLAIN + OF_HEADS if view.is_head else PLAIN
        if rare and rng.random() < RARE_SHARE:
            templates = WITH_WORD
        elif not view.colour:
            templates = [(text, weight) for text, weight in templates if "{colour}" not in text]
        text = templates[rng.choice(len(templates), p=shares([weight for _, weight in templates]))][0]
        word = self.words.choose(view.subject, *rng.random(2))
        return with_articles(text.format(colour=view.colour, thing=called(view.thing, rng.random()), word=word))


def recoloured(pixels, rng, amount):
    """Saturation, contrast, brightness and tint off by up to `amount`: float [n, 3, h, w] -> uint8 [n, h, w, 3]."""
    n, device = len(pixels), pixels.device
    factors = torch.from_numpy(rng.uniform(1 - amount, 1 + amount, (n, 3, 1, 1))).float().to(device)
    tints = torch.from_numpy(rng.uniform(1 - amount / 3, 1 + amount / 3, (n, 3, 1, 1))).float().to(device)
    saturation, contrast, brightness = factors.split(1, dim=1)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * saturation
    middle = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (middle + (pixels - middle) * contrast) * brightness * tints
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
