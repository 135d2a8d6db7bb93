"""Toy shapes: a data set that needs no download, drawn on the fly, on which a detector can be seen to learn in minutes.

A scene is 1 to 6 shapes of 5 classes with tight boxes, partly behind each other. `scene` places them, `picture` draws
them; data.py makes a data set of it.
"""
import math
import random

import numpy as np
from PIL import Image, ImageDraw


def _outline(corners, start, radii=(1.0,)):
    angle, radius = math.radians(start) + np.arange(corners) * 2 * math.pi / corners, np.resize(radii, corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)  # [corners, 2]


OUTLINES = {"circle": _outline(48, 0), "square": _outline(4, 45), "triangle": _outline(3, -90),
            "star": _outline(10, -90, (1.0, 0.45)), "ring": _outline(48, 0)}
PALETTE = [(r, g, b) for r in (30, 128, 225) for g in (30, 128, 225) for b in (30, 128, 225)]


def shape_mask(name, points):
    """Coverage of the shape whose outline is points [k,2] in pixels: (PIL "L" mask, its (left, top) in the picture).
    Drawn 4x as large, then averaged: PIL draws in whole pixels, and so the edges lie within an eighth of a pixel of
    `points`, whose extremes are the box."""
    low, high = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
    mask, points = Image.new("L", tuple((4 * (high - low)).tolist())), (points - low) * 4
    ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=255)
    if name == "ring":
        ImageDraw.Draw(mask).polygon((points * 0.55 + points.mean(0) * 0.45).ravel().tolist(), fill=0)
    return mask.reduce(4), tuple(low.tolist())


def scene(key, size):
    """(random.Random to go on drawing with, list of (name, outline [k,2] px, box [x,y,w,h] px)), from `key` alone."""
    rng, shapes, hidden = random.Random(key), [], []                      # hidden: share of each box behind others
    for _ in range(rng.randint(1, 6)):
        name = rng.choice(list(OUTLINES))
        for _ in range(20):                                    # tries to find a place; in a full picture it is left out
            cos, sin = math.cos(turn := rng.uniform(-0.3, 0.3)), math.sin(turn)
            points = OUTLINES[name] @ np.array([[cos, sin], [-sin, cos]])
            points -= points.min(0)
            points *= size * rng.uniform(0.12, 0.5) / points.max()                              # the box's longer side
            w, h = points.max(0).tolist()
            x, y = rng.uniform(0, size - w), rng.uniform(0, size - h)
            behind = [part + max(0, min(x + w, X + W) - max(x, X)) * max(0, min(y + h, Y + H) - max(y, Y)) / (W * H)
                      for part, (_, _, (X, Y, W, H)) in zip(hidden, shapes)]
            if max(behind, default=0) <= 0.3:      # of the box, which keeps about half of the shape in sight at worst
                shapes.append((name, points + [x, y], [x, y, w, h]))
                hidden = behind + [0]
                break
    return rng, shapes


def picture(rng, shapes, size):
    """The scene as a PIL image: a shaded, noisy ground, and the shapes in its own colours, later ones on top."""
    # Two colours of a picture differ by at least 57 levels (97 - 2 * 20) in some channel, so that edges show.
    ground, *colours = [tuple(level + rng.randint(-20, 20) for level in colour)
                        for colour in rng.sample(PALETTE, len(shapes) + 1)]
    part, across = rng.uniform(0, 1), np.linspace(-30, 30, size, dtype=np.float32)
    ramp = part * across[:, None] + (1 - part) * across                    # [size,size]: lighter to one side, and noise
    noise = np.frombuffer(rng.randbytes(size ** 2 * 3), np.uint8).reshape(size, size, 3)
    pixels = np.float32(ground) + ramp[..., None] + (noise * np.float32(0.12) - 15)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for (name, points, _), colour in zip(shapes, colours):
        mask, corner = shape_mask(name, points)
        image.paste(colour, corner, mask)
    return image
