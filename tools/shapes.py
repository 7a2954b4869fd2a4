"""Nineteen things, each drawn with a pen that works in units of the thing's radius."""

import math

from PIL import ImageDraw

WHITE, INK, GLASS, WOOD = (250, 250, 250), (22, 20, 24), (198, 224, 242), (104, 72, 46)


class Pen:
    """Draws in units of the thing's radius around its centre: x to the right, y down."""

    def __init__(self, layer, centre_x, centre_y, radius, colour):
        self.canvas = ImageDraw.Draw(layer)
        self.centre_x, self.centre_y, self.radius = centre_x, centre_y, radius
        self.colour = colour
        self.dark = tuple(int(value * 0.6) for value in colour)
        self.light = tuple(int(value + (255 - value) * 0.5) for value in colour)

    def place(self, *points):
        """Unit coordinates -> pixels."""
        return [(self.centre_x + x * self.radius, self.centre_y + y * self.radius) for x, y in points]

    def oval(self, x, y, half_width, half_height, fill):
        self.canvas.ellipse(
            self.place((x - half_width, y - half_height), (x + half_width, y + half_height)), fill=fill
        )

    def polygon(self, fill, *points):
        self.canvas.polygon(self.place(*points), fill=fill)

    def box(self, left, top, right, bottom, fill, corner=0.0):
        corners = self.place((left, top), (right, bottom))
        self.canvas.rounded_rectangle(corners, radius=corner * self.radius, fill=fill)

    def line(self, fill, width, *points):
        self.canvas.line(self.place(*points), fill=fill, width=max(1, round(width * self.radius)), joint="curve")

    def arc(self, x, y, half_width, half_height, start, end, fill, width):
        corners = self.place((x - half_width, y - half_height), (x + half_width, y + half_height))
        self.canvas.arc(corners, start, end, fill=fill, width=max(1, round(width * self.radius)))

    def eyes(self, spread, y, size, pupil_width, pupil_height):
        for side in (-1, 1):
            self.oval(side * spread, y, size, size, WHITE)
            self.oval(side * spread, y, pupil_width, pupil_height, INK)


def cat(pen, rng):
    for side in (-1, 1):
        pen.polygon(pen.colour, (side * 0.96, -0.2), (side * 0.84, -1.3), (side * 0.15, -0.78))
        pen.polygon((232, 164, 166), (side * 0.8, -0.5), (side * 0.75, -1.05), (side * 0.4, -0.76))
    pen.oval(0, 0, 1, 0.88, pen.colour)
    for x in (-0.24, 0, 0.24):
        pen.line(pen.dark, 0.1, (x, -0.84), (x * 0.8, -0.48))
    pen.oval(0, 0.4, 0.42, 0.3, pen.light)
    for side in (-1, 1):
        for tilt in (-0.08, 0.1):
            pen.line(pen.light, 0.03, (side * 0.4, 0.36 + tilt), (side * 1.2, 0.3 + 2.2 * tilt))
    pen.eyes(0.4, -0.12, 0.21, 0.09, 0.18)
    pen.polygon((222, 110, 120), (-0.13, 0.2), (0.13, 0.2), (0, 0.36))


def dog(pen, rng):
    pen.oval(0, 0, 0.92, 0.92, pen.colour)
    for side in (-1, 1):
        pen.oval(side * 0.92, -0.02, 0.3, 0.74, pen.dark)
    pen.oval(0, 0.42, 0.52, 0.42, pen.light)
    if rng.random() < 0.5:
        pen.oval(0, 0.72, 0.14, 0.24, (226, 96, 110))
    pen.eyes(0.36, -0.2, 0.2, 0.13, 0.13)
    pen.oval(0, 0.26, 0.2, 0.14, INK)


def fish(pen, rng):
    pen.polygon(pen.dark, (0.65, 0), (1.3, -0.55), (1.15, 0), (1.3, 0.55))
    pen.polygon(pen.dark, (-0.2, -0.5), (0.35, -0.98), (0.5, -0.3))
    pen.oval(0, 0, 1, 0.62, pen.colour)
    pen.oval(-0.1, 0.26, 0.62, 0.28, pen.light)
    for x in (-0.05, 0.25, 0.55):
        pen.arc(x - 0.2, 0, 0.24, 0.36, -60, 60, pen.dark, 0.06)
    pen.oval(-0.58, -0.14, 0.17, 0.17, WHITE)
    pen.oval(-0.6, -0.14, 0.09, 0.09, INK)


def bird(pen, rng):
    for x in (-0.1, 0.2):
        pen.line((226, 150, 50), 0.08, (x, 0.7), (x, 1.12), (x - 0.18, 1.12))
    pen.polygon(pen.dark, (0.45, 0.1), (1.3, -0.2), (1.2, 0.25), (0.5, 0.55))
    pen.oval(0.05, 0.2, 0.78, 0.62, pen.colour)
    pen.oval(-0.42, -0.45, 0.46, 0.46, pen.colour)
    pen.oval(-0.22, 0.4, 0.42, 0.34, pen.light)
    pen.polygon((240, 170, 50), (-0.82, -0.6), (-1.28, -0.4), (-0.8, -0.26))
    pen.oval(0.3, 0.12, 0.44, 0.3, pen.dark)
    pen.oval(-0.52, -0.54, 0.14, 0.14, WHITE)
    pen.oval(-0.54, -0.54, 0.08, 0.08, INK)


def house(pen, rng):
    pen.box(0.4, -0.95, 0.62, -0.3, pen.dark)
    pen.box(-0.82, -0.25, 0.82, 0.95, pen.colour)
    pen.polygon(pen.dark, (-1.05, -0.2), (0, -1.05), (1.05, -0.2))
    pen.box(-0.2, 0.32, 0.2, 0.95, WOOD, 0.04)
    pen.oval(0.11, 0.64, 0.045, 0.045, (240, 210, 90))
    for side in (-1, 1):
        pen.box(side * 0.52 - 0.18, 0, side * 0.52 + 0.18, 0.34, GLASS)
        pen.line(WHITE, 0.04, (side * 0.52, 0), (side * 0.52, 0.34))


def tree(pen, rng):
    pen.polygon(WOOD, (-0.14, 0.1), (0.14, 0.1), (0.22, 1.12), (-0.22, 1.12))
    if rng.random() < 0.35:  # a fir, else a round crown
        for top, width in ((-1.15, 0.55), (-0.75, 0.78), (-0.3, 1.0)):
            pen.polygon(pen.colour, (0, top), (width, top + 0.9), (-width, top + 0.9))
            pen.line(pen.dark, 0.06, (-width, top + 0.9), (width, top + 0.9))
        return
    for x, y, size in ((-0.5, 0.02, 0.5), (0.5, 0.02, 0.5), (0, -0.4, 0.74)):
        pen.oval(x, y, size, size, pen.colour)
    for x, y, size in ((-0.25, -0.6, 0.24), (0.4, -0.1, 0.17), (-0.55, 0.0, 0.16)):
        pen.oval(x, y, size, size * 0.85, pen.light)


def car(pen, rng):
    pen.polygon(pen.colour, (-0.8, 0.02), (-0.48, -0.55), (0.42, -0.55), (0.8, 0.02))
    pen.box(-1.2, -0.08, 1.2, 0.48, pen.colour, 0.2)
    pen.polygon(GLASS, (-0.6, -0.05), (-0.4, -0.43), (-0.04, -0.43), (-0.04, -0.05))
    pen.polygon(GLASS, (0.05, -0.05), (0.05, -0.43), (0.36, -0.43), (0.6, -0.05))
    pen.line(pen.dark, 0.05, (-1.15, 0.3), (1.15, 0.3))
    pen.oval(-1.1, 0.1, 0.1, 0.1, (255, 240, 170))
    for x in (-0.66, 0.66):
        pen.oval(x, 0.48, 0.29, 0.29, (30, 30, 32))
        pen.oval(x, 0.48, 0.13, 0.13, (190, 190, 194))


def ball(pen, rng):
    pen.oval(0, 0, 0.95, 0.95, pen.colour)
    pen.oval(0, 0, 0.5, 0.95, pen.light)
    pen.oval(0, 0, 0.2, 0.95, pen.colour)
    pen.oval(-0.36, -0.46, 0.18, 0.13, WHITE)


def cup(pen, rng):
    pen.arc(0.62, 0.0, 0.55, 0.48, -100, 100, pen.dark, 0.17)
    pen.polygon(pen.colour, (-0.8, -0.65), (0.8, -0.65), (0.58, 0.85), (-0.58, 0.85))
    pen.oval(0, 0.85, 0.58, 0.12, pen.colour)
    pen.oval(0, -0.65, 0.8, 0.22, pen.light)
    pen.oval(0, -0.62, 0.66, 0.15, (92, 56, 36))
    pen.line(pen.light, 0.1, (-0.56, -0.3), (-0.43, 0.6))


def star(pen, rng):
    turn = rng.uniform(-0.15, 0.15)

    def spikes(scale):
        for corner in range(10):
            angle, length = turn + corner * math.pi / 5, scale * (1.1 if corner % 2 == 0 else 0.48)
            yield length * math.sin(angle), -length * math.cos(angle)

    pen.polygon(pen.dark, *spikes(1.0))
    pen.polygon(pen.colour, *spikes(0.88))
    pen.polygon(pen.light, *spikes(0.35))


def flower(pen, rng):
    pen.line((70, 136, 66), 0.13, (0, 0), (0.05, 1.2))
    pen.oval(0.36, 0.82, 0.32, 0.13, (84, 156, 78))
    count, turn = rng.choice((5, 6, 8)), rng.uniform(0, 1)
    for petal in range(count):
        angle = 2 * math.pi * (petal + turn) / count
        x, y = 0.55 * math.cos(angle), 0.55 * math.sin(angle) - 0.25
        pen.oval(x, y, 0.36, 0.36, pen.dark)
        pen.oval(x, y, 0.31, 0.31, pen.colour)
    pen.oval(0, -0.25, 0.3, 0.3, (246, 206, 74) if pen.colour[2] > 90 or pen.colour[1] < 120 else (120, 76, 44))


def boat(pen, rng):
    pen.line(WOOD, 0.09, (0, -1.1), (0, 0.35))
    pen.polygon(pen.colour, (0.08, -1.05), (0.95, 0.15), (0.08, 0.15))
    pen.polygon(pen.light, (-0.08, -0.8), (-0.08, 0.15), (-0.7, 0.15))
    pen.polygon(pen.dark, (-1.1, 0.3), (1.1, 0.3), (0.72, 0.85), (-0.75, 0.85))
    pen.line(WHITE, 0.08, (-1.0, 0.4), (1.02, 0.4))


def chair(pen, rng):
    for x in (-0.62, 0.6):
        pen.box(x - 0.08, -1.1 if x < 0 else 0.2, x + 0.08, 1.1, pen.dark)
    for x in (-0.3, 0.3):
        pen.box(x - 0.06, 0.2, x + 0.06, 0.9, pen.dark)
    pen.box(-0.72, -1.1, -0.38, 0.25, pen.colour, 0.1)
    pen.box(-0.72, 0.1, 0.75, 0.38, pen.colour, 0.1)
    pen.box(-0.55, 0.02, 0.66, 0.18, pen.light, 0.08)


def mushroom(pen, rng):
    pen.polygon((240, 228, 204), (-0.26, 0), (0.26, 0), (0.36, 0.9), (-0.36, 0.9))
    pen.oval(0, 0.9, 0.36, 0.14, (240, 228, 204))
    pen.canvas.pieslice(pen.place((-1.05, -0.95), (1.05, 1.05)), 180, 360, fill=pen.colour)
    pen.oval(0, 0.05, 1.05, 0.15, pen.dark)
    for x, y, size in ((-0.5, -0.3, 0.17), (0.1, -0.58, 0.2), (0.58, -0.22, 0.15)):
        pen.oval(x, y, size, size * 0.85, pen.light)


def apple(pen, rng):
    for x in (-0.36, 0.36):
        pen.oval(x, 0.12, 0.62, 0.78, pen.colour)
    pen.oval(0, -0.5, 0.26, 0.12, pen.dark)
    pen.line(WOOD, 0.1, (0, -0.5), (0.12, -1.05))
    pen.polygon((86, 160, 72), (0.1, -0.72), (0.42, -1.1), (0.82, -0.95), (0.48, -0.68))
    pen.oval(-0.52, -0.18, 0.15, 0.24, pen.light)


def clock(pen, rng):
    for side in (-1, 1):
        pen.line(pen.dark, 0.14, (side * 0.4, 0.6), (side * 0.68, 1.12))
        pen.oval(side * 0.62, -0.84, 0.26, 0.24, pen.dark)
    pen.oval(0, 0, 1, 1, pen.colour)
    pen.oval(0, 0, 0.78, 0.78, (248, 246, 238))
    for hour in range(0, 12, 3):
        x, y = math.sin(hour * math.pi / 6), math.cos(hour * math.pi / 6)
        pen.line(INK, 0.07, (0.56 * x, 0.56 * y), (0.7 * x, 0.7 * y))
    for length, width in ((0.36, 0.11), (0.56, 0.07)):
        angle = rng.uniform(0, 2 * math.pi)
        pen.line(INK, width, (0, 0), (length * math.sin(angle), -length * math.cos(angle)))
    pen.oval(0, 0, 0.07, 0.07, INK)


def bowl(pen, rng):
    deep = rng.uniform(0.75, 1.05)
    pen.oval(0, deep * 0.78, 0.42, 0.14, pen.dark)
    pen.canvas.pieslice(pen.place((-1.1, -0.3 - deep), (1.1, -0.1 + deep)), 0, 180, fill=pen.colour)
    pen.oval(0, -0.2, 1.1, 0.3, pen.light)
    pen.oval(0, -0.17, 0.98, 0.22, pen.dark)
    if rng.random() < 0.5:  # with something in it
        fruit = rng.choice(((150, 30, 50), (60, 70, 140), (210, 150, 60), (90, 150, 70)))
        for x in (-0.6, -0.3, 0, 0.3, 0.6, -0.45, -0.1, 0.2, 0.5):
            pen.oval(x, -0.24 + rng.uniform(-0.1, 0.06), 0.2, 0.17, fruit)
    pen.line(pen.light, 0.07, (-0.8, 0.2), (-0.5, 0.52))


def vase(pen, rng):
    neck, belly, low = rng.uniform(0.2, 0.4), rng.uniform(0.55, 0.85), rng.uniform(0.25, 0.45)
    if rng.random() < 0.4:  # with flowers
        for x in (-0.4, 0, 0.4):
            pen.line((70, 136, 66), 0.06, (x * 0.3, -0.6), (x, -1.25))
            pen.oval(x, -1.25, 0.2, 0.2, (240, rng.randint(80, 220), rng.randint(60, 200)))
    heights = [step / 12 for step in range(13)]
    middle = [neck + (belly - neck) * math.sin(math.pi * min(1, height * 1.25)) ** 2 for height in heights]
    widths = [width + 0.6 * (low - width) * height for width, height in zip(middle, heights, strict=True)]
    left = [(-width, 2 * height - 0.9) for width, height in zip(widths, heights, strict=True)]
    pen.polygon(pen.colour, *left, *[(-x, y) for x, y in reversed(left)])
    pen.oval(0, 1.1, widths[-1], 0.1, pen.colour)
    pen.oval(0, -0.9, neck, 0.1, pen.dark)
    pen.line(pen.light, 0.09, (-belly * 0.55, -0.2), (-belly * 0.6, 0.25))
    if rng.random() < 0.3:
        pen.line(pen.dark, 0.08, (-belly * 0.8, 0.05), (belly * 0.8, 0.05))


def teapot(pen, rng):
    wide, high = rng.uniform(0.7, 0.9), rng.uniform(0.55, 0.75)
    pen.arc(wide, 0.15, 0.42, 0.46, -110, 110, pen.dark, 0.15)
    pen.polygon(pen.colour, (-wide * 0.6, 0.5), (-wide * 0.7, -0.02), (-1.25, -0.5), (-1.1, -0.56), (-wide * 0.9, 0.0))
    pen.oval(0, 0.22, wide, high, pen.colour)
    pen.oval(0, 0.2 + high, wide * 0.55, 0.09, pen.dark)
    pen.oval(0, 0.26 - high, wide * 0.5, 0.14, pen.dark)
    pen.oval(0, 0.2 - high, wide * 0.46, 0.12, pen.light)
    pen.oval(0, 0.02 - high, 0.12, 0.12, pen.dark)
    pen.line(pen.light, 0.1, (-wide * 0.5, -0.1), (-wide * 0.62, 0.25))


THINGS = {
    function.__name__: function
    for function in (
        *(cat, dog, fish, bird, house, tree, car, ball),
        *(cup, star, flower, boat, chair, mushroom, apple, clock),
        *(bowl, vase, teapot),
    )
}
