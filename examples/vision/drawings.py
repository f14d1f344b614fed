"""Draw pictures for a first run without a download.

Ten classes: five shapes, each filled with one colour or with stripes. Position, size, rotation, colours, background and
noise are random and independent of the class. A picture is a function of (seed, split, number).
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "triangle", "square", "star", "cross")
CLASSES = tuple(f"{shape}, {texture}" for shape in SHAPES for texture in ("plain", "striped"))
SIZES = {"train": 4000, "validation": 500, "test": 500}


def label(number: int) -> int:
    """Return the class of a picture: the classes take turns."""
    return number % len(CLASSES)


def draw(split: str, number: int, seed: int = 0, size: int = 48) -> Image.Image:
    """Draw one picture, RGB, (size, size) pixels."""
    random = np.random.default_rng((seed, list(SIZES).index(split), number))
    shape, striped = SHAPES[label(number) // 2], label(number) % 2
    back, front, stripe = random.integers(0, 256, (3, 3))
    while np.abs(front - back).sum() < 200:  # an invisible shape has no class
        front = random.integers(0, 256, 3)
    radius = size * random.uniform(0.2, 0.38)
    x, y = random.uniform(radius, size - radius, 2)
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).polygon(_outline(shape, x, y, radius, random.uniform(0, 2 * math.pi)), fill=255)
    canvas = np.broadcast_to(back, (size, size, 3)).astype(np.float64)
    fill = np.broadcast_to(front, canvas.shape).astype(np.float64)
    if striped:
        angle, width = random.uniform(0, math.pi), random.uniform(2.5, 4.5)
        rows, columns = np.mgrid[:size, :size]
        along = (columns * math.cos(angle) + rows * math.sin(angle)) // width
        fill = np.where((along % 2 == 0)[..., None], fill, (stripe + 128) % 256 if _near(stripe, front) else stripe)
    canvas = np.where(np.asarray(mask)[..., None] > 0, fill, canvas) + random.normal(0, 8, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _near(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).sum() < 150)


def _outline(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around (x, y); a circle is a polygon with 40 corners."""
    if shape == "circle":
        points = [(radius * 0.85, 2 * math.pi * i / 40) for i in range(40)]
    elif shape == "star":
        points = [(radius * (0.4 if i % 2 else 1.0), math.pi * i / 5) for i in range(10)]
    elif shape == "cross":
        arm = 0.35  # half the angle of an arm's end
        ends = [(math.pi / 2 * i + d, r) for i in range(4) for d, r in ((-arm, 1.0), (arm, 1.0), (math.pi / 4, 0.48))]
        points = [(radius * r, angle) for angle, r in ends]
    else:
        corners = {"triangle": 3, "square": 4}[shape]
        points = [(radius, 2 * math.pi * i / corners) for i in range(corners)]
    return [(x + r * math.cos(angle + turn), y + r * math.sin(angle + turn)) for r, angle in points]
