"""Bowls, vases, cups and teapots as photos would show them: turned shapes, lit, before pieces of photos.

Of these no photo may be used that is not a subject's, and flat drawings do not teach the CLIP what a real one looks
like: everything in a photo was a cat to it.
"""

import math
import random

import numpy as np
from PIL import Image, ImageFilter

from tools.drawings import COLOURS, SIZE, backdrop, texture, varied, with_articles
from tools.photos import detail_crop

FRAME = 2 * SIZE  # pixels that points are painted on, before they are shrunk
NUM_ALONG, NUM_AROUND = 260, 260  # points of a surface
TEMPLATES = ("a photo of a {colour} {thing}", "a photo of a {thing}", "a photo of a {thing}", "a {colour} {thing}")


def smooth(knots, values, count=NUM_ALONG):
    """A curve through the values at the knots in [0, 1], with flat ends between each two: float [count]."""
    t = np.linspace(0, 1, count)
    at = np.clip(np.searchsorted(knots, t, side="right") - 1, 0, len(knots) - 2)
    knots, values = np.asarray(knots, float), np.asarray(values, float)
    share = (t - knots[at]) / (knots[at + 1] - knots[at])
    share = share * share * (3 - 2 * share)
    return values[at] * (1 - share) + values[at + 1] * share


def revolved(radius, height):
    """Radii and heights [n] -> points [n, m, 3] around the upright axis y."""
    angle = np.linspace(0, 2 * math.pi, NUM_AROUND)
    x, z = np.outer(radius, np.cos(angle)), np.outer(radius, np.sin(angle))
    return np.stack([x, np.broadcast_to(height[:, None], x.shape), z], -1)


def tube(curve, radius):
    """A curve [n, 2] in the plane of the picture and its radii [n] -> points [n, m, 3] of a bent pipe."""
    along = np.gradient(curve, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], 1) / (np.linalg.norm(along, axis=1)[:, None] + 1e-9)
    angle = np.linspace(0, 2 * math.pi, NUM_AROUND // 4)
    out = curve[:, None] + (radius[:, None] * np.cos(angle))[..., None] * across[:, None]
    return np.concatenate([out, (radius[:, None] * np.sin(angle))[..., None]], -1)


def handle(rng, x, low, high, reach, thickness):
    """A ring at the side x, from one height to the other."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 80)
    middle, half = (low + high) / 2, (high - low) / 2
    curve = np.stack([x + reach * np.cos(angle) * np.sign(x), middle + half * np.sin(angle)], 1)
    return tube(curve, np.full(80, thickness * rng.uniform(0.8, 1.2)))


def vase(rng):
    foot, belly, neck = rng.uniform(0.12, 0.4), rng.uniform(0.25, 0.7), rng.uniform(0.06, 0.3)
    knots = [0, rng.uniform(0.25, 0.55), rng.uniform(0.65, 0.85), 1]
    radius = smooth(knots, [foot, belly, neck, neck * rng.uniform(1, 1.8)])
    return [revolved(radius, np.linspace(-1, 1, NUM_ALONG))]


def bowl(rng):
    t = np.linspace(0.02, 1, NUM_ALONG)
    radius, depth = t ** rng.uniform(0.35, 0.7), rng.uniform(0.7, 1.1)
    surfaces = [revolved(radius, depth * (t - 0.5))]
    if rng.random() < 0.6:  # something in it
        level = rng.uniform(0.6, 0.95)
        filling = np.linspace(0, np.interp(level, t, radius), NUM_ALONG)
        surfaces.append(revolved(filling, depth * (level - 0.5) + 0.15 * np.cos(filling * math.pi / 2)))
    return surfaces


def cup(rng):
    top, depth = rng.uniform(0.55, 0.8), rng.uniform(0.9, 1.4)
    radius = smooth([0, 0.15, 1], [top * 0.6, top * rng.uniform(0.75, 1), top])
    body = revolved(radius, np.linspace(-depth / 2, depth / 2, NUM_ALONG))
    return [body, handle(rng, top * 0.9, -0.3 * depth, 0.3 * depth, 0.35, 0.07)]


def teapot(rng):
    t, width, height = np.linspace(0, math.pi * 0.93, NUM_ALONG), rng.uniform(0.6, 0.8), rng.uniform(0.45, 0.7)
    body = revolved(width * np.sin(t) ** rng.uniform(0.6, 1), -height * np.cos(t))
    lid = revolved(np.linspace(0.3, 0.0, NUM_ALONG), height * 0.93 + 0.15 * np.linspace(0, 1, NUM_ALONG) ** 2)
    knob = revolved(0.08 * np.sin(np.linspace(0, math.pi, NUM_ALONG)), height + 0.12 + np.linspace(0, 0.15, NUM_ALONG))
    share = np.linspace(0, 1, 80)
    spout = np.stack([width * 0.75 + 0.5 * share, -0.15 * height + (height + 0.1) * share ** rng.uniform(1, 2)], 1)
    parts = [body, lid, knob, tube(spout, 0.17 - 0.1 * share)]
    return [*parts, handle(rng, -width * 0.85, -0.5 * height, 0.6 * height, 0.35, 0.07)]


THINGS = (vase, bowl, cup, teapot)


def lit(points, rng, colour, light):
    """Points [n, m, 3] of a surface -> their colours [n, m, 3]: soft light, a highlight, and some pattern."""
    normal = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9
    normal *= np.where(normal[..., 2:] < 0, -1, 1)  # whichever side is seen
    diffuse = np.clip(normal @ light, 0, 1)[..., None]
    bright = np.clip(normal @ (light + [0, 0, 1]) / np.linalg.norm(light + [0, 0, 1]), 0, 1)[..., None]
    shine, sharp = rng.choice((0, 40, 120)), rng.choice((8, 30, 80))
    base = np.broadcast_to(np.asarray(colour, float), points.shape).copy()
    if rng.random() < 0.3:  # glazed in a second colour from some height on
        other = np.array(COLOURS[rng.choice(list(COLOURS))], float)
        base[points[..., 1] > rng.uniform(-0.4, 0.6)] = other
    base *= 1 + rng.uniform(0, 0.12) * np.random.default_rng(rng.randrange(1 << 30)).standard_normal(
        (*base.shape[:2], 1)
    )
    return base * (rng.uniform(0.25, 0.5) + 0.75 * diffuse) + shine * bright**sharp


def layer_of(surfaces, rng, colour):
    """Painted from far to near: RGBA [64, 64]."""
    tilt, turn, roll = rng.uniform(0.15, 0.6), rng.uniform(-0.5, 0.5), rng.uniform(-0.1, 0.1)
    if rng.random() < 0.5:
        turn += math.pi
    light = np.array([rng.uniform(-1, 1), rng.uniform(0.2, 1), rng.uniform(0.3, 1)])
    light /= np.linalg.norm(light)
    cos, sin = math.cos, math.sin
    about_y = np.array([[cos(turn), 0, sin(turn)], [0, 1, 0], [-sin(turn), 0, cos(turn)]])
    about_x = np.array([[1, 0, 0], [0, cos(tilt), -sin(tilt)], [0, sin(tilt), cos(tilt)]])
    about_z = np.array([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])
    turned = [points @ (about_z @ about_x @ about_y).T for points in surfaces]
    colours = [lit(points, rng, colour, light).reshape(-1, 3) for points in turned]
    points, colours = np.concatenate([part.reshape(-1, 3) for part in turned]), np.concatenate(colours)
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    scale = FRAME * rng.uniform(0.4, 0.92) / (high - low).max()
    free = FRAME - (high - low) * scale
    corner = free * [rng.uniform(0.1, 0.9), rng.uniform(0.05, 0.6)]  # from the left, from below
    x, y = ((points[:, :2] - low) * scale + corner).T
    order = points[:, 2].argsort()
    rows, columns = np.clip(FRAME - 1 - y.astype(int), 0, FRAME - 1), np.clip(x.astype(int), 0, FRAME - 1)
    frame = np.zeros((FRAME, FRAME, 4), np.uint8)
    frame[rows[order], columns[order], :3] = np.clip(colours[order], 0, 255)
    frame[rows, columns, 3] = 255
    return Image.fromarray(frame).filter(ImageFilter.BoxBlur(0.4)).resize((SIZE, SIZE), Image.Resampling.BOX)


def behind(seed, rng):
    """A piece of a photo, mostly out of focus, or a wall, or a texture: float [64, 64, 3]."""
    kind = rng.random()
    if kind < 0.25:
        return backdrop(varied(COLOURS[rng.choice(list(COLOURS))], rng), rng)
    if kind < 0.45:
        return texture(rng)[0]
    crop = Image.fromarray(detail_crop(seed)).filter(ImageFilter.GaussianBlur(rng.choice((0, 1, 2, 3))))
    return np.asarray(crop, np.float32) * rng.uniform(0.4, 1.1)


def render(seed):
    """One picture, wholly decided by the seed: uint8 [64, 64, 3] and its caption."""
    rng = random.Random(f"rendered {seed}")
    shape, name = rng.choice(THINGS), rng.choice(list(COLOURS))
    layer = layer_of(shape(rng), rng, varied(COLOURS[name], rng, 30))
    shadow = np.asarray(layer.getchannel("A").filter(ImageFilter.GaussianBlur(3)), np.float32)[..., None] / 255
    shadow = np.roll(shadow, (rng.randint(1, 4), rng.randint(-3, 3)), (0, 1))
    pixels = np.asarray(layer, np.float32)
    opacity = pixels[..., 3:] / 255
    picture = behind(seed, rng) * (1 - rng.uniform(0.1, 0.5) * shadow) * (1 - opacity) + pixels[..., :3] * opacity
    picture = picture * np.array([rng.uniform(0.85, 1.1) for _ in range(3)]) * rng.uniform(0.5, 1.1)
    caption = with_articles(rng.choice(TEMPLATES).format(thing=shape.__name__, colour=name))
    return np.clip(picture, 0, 255).astype(np.uint8), caption
