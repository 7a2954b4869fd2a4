"""Subjects cut out of the photos, to be put before other backgrounds: what teaches 'a cat on a red background'.

GrabCut (Rother and others 2004) by OpenCV finds the subject in its box; what it finds was looked at, and is left out
where it is too little of the box to be the subject.
"""

import functools
import random

import numpy as np
from PIL import Image, ImageEnhance

from tools.drawings import COLOURS, SIZE, on_background, varied, with_articles
from tools.tiny_photos import called, read_boxes, views
from tools.words import RARE_SHARE, Words

LEAST_SHARE, LEAST_SIDE = 0.4, 40  # of the box that must be subject; pixels of its longer side
LARGEST = 160  # pixels of the longer side of a cut-out


def mask_of(pixels, box):
    """uint8 [H, W, 3], box as fractions -> the subject as bool [H, W], one piece."""
    import cv2

    height, width = pixels.shape[:2]
    left, top, right, bottom = (round(value * size) for value, size in zip(box, (width, height) * 2, strict=True))
    found = np.zeros((height, width), np.uint8)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    rectangle = left, top, right - left, bottom - top
    cv2.grabCut(np.ascontiguousarray(pixels[..., ::-1]), found, rectangle, *models, 6, cv2.GC_INIT_WITH_RECT)
    subject = np.isin(found, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    _, pieces, measures, _ = cv2.connectedComponentsWithStats(subject)
    if len(measures) > 1:
        subject = (pieces == 1 + measures[1:, cv2.CC_STAT_AREA].argmax()).astype(np.uint8)
    return cv2.morphologyEx(subject, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)).astype(bool)


def path_of(folder, name):
    """Where the cut-out of a photo of photo_boxes.txt lies."""
    return folder / name.replace("/", "_").replace(".jpg", ".png")


def write_cut_outs(photos, folder):
    """Writes an RGBA picture for each photo of photo_boxes.txt whose subject is found."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, weight, _, _, boxes in read_boxes():
        if not weight or not boxes:
            continue
        left, top, right, bottom = boxes[0]
        area = (right - left) * (bottom - top)
        if area > 0.93:
            continue  # no background to tell it from
        pixels = np.asarray(Image.open(photos / name).convert("RGB"))
        mask = mask_of(pixels, boxes[0])
        ys, xs = np.nonzero(mask)
        if mask.mean() < LEAST_SHARE * area or max(np.ptp(xs), np.ptp(ys)) < LEAST_SIDE:
            continue
        layer = Image.fromarray(np.dstack([pixels, mask * np.uint8(255)]))
        layer = layer.crop((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        layer.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        layer.save(path_of(folder, name))


@functools.cache
def cut_outs(folder):
    """[(layer, view)] and their words, read once a process."""
    rows = read_boxes()
    paths = [(path_of(folder, row[0]), row) for row in rows]
    found = [(Image.open(path).convert("RGBA"), views(row, 0)[0]) for path, row in paths if path.exists()]
    return found, Words(row[2] for row in rows if row[1])


def placed(layer, rng):
    """A cut-out somewhere in the frame, at most a little outside of it, recoloured a little: RGBA [64, 64]."""
    opacity = layer.getchannel("A")
    for enhance in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness):
        layer = enhance(layer).enhance(rng.uniform(0.85, 1.15))
    layer.putalpha(opacity)
    turned = layer.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    scale = SIZE * rng.uniform(0.6, 1.05) / max(turned.size)
    small = turned.resize([max(1, round(side * scale)) for side in turned.size], Image.Resampling.LANCZOS)
    frame = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    free = [SIZE - side for side in small.size]
    frame.paste(small, (round(free[0] * rng.uniform(0.2, 0.8)), round(free[1] * rng.uniform(0.4, 1.0))))
    return frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else frame


def draw_cut_out(seed, folder):
    """A subject of the photos on another background, wholly decided by the seed: uint8 [64, 64, 3] and a caption."""
    rng, (choices, words) = random.Random(seed), cut_outs(folder)
    layer, view = rng.choices(choices, [choice[1].weight for choice in choices])[0]
    background = rng.choice(list(COLOURS))
    pixels, place = on_background(placed(layer, rng), varied(COLOURS[background], rng), rng)
    thing = called(view.thing, rng.random())
    thing = f"{view.colour} {thing}" if view.colour and rng.random() < 0.3 else thing
    word = words.choose(view.subject, rng.random(), rng.random())
    thing = f"{word if rng.random() < RARE_SHARE else rng.choice(('a', 'a', 'a', 'my'))} {thing}"
    place = place or f"on a {background} background"
    text = rng.choice((f"a photo of {thing} {place}", f"a photo of {thing} {place}", f"{thing} {place}"))
    return pixels, with_articles(text if rng.random() < 0.85 else f"a photo of {thing}")
