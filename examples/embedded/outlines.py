"""Geometric shapes as masks with smooth edges, at any size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

FINER = 4  # subpixels of a mask along each side of a pixel

Points = list[tuple[float, float]]  # x to the right, y down, within -1 to 1


def _polygon(corners: int, turn: float = 0.0, valley: float | None = None) -> Points:
    """A regular polygon with a corner straight up, or a star whose inner corners are at distance `valley`."""
    steps = corners * (2 if valley else 1)
    radii = [valley if valley and i % 2 else 1.0 for i in range(steps)]
    angles = np.arange(steps) * 2 * np.pi / steps + turn
    return [(r * np.sin(a), -r * np.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _ellipse(width: float = 1.0, height: float = 1.0, x: float = 0.0, y: float = 0.0) -> Points:
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    return [(x + width * np.cos(a), y + height * np.sin(a)) for a in angles]


def _rectangle(width: float, height: float) -> Points:
    return [(-width, -height), (width, -height), (width, height), (-width, height)]


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return list(zip(x / 17, (y - 2.5) / 15.5, strict=True))


def _cross() -> Points:
    a, b = 0.34, 0.98
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


OUTLINES: dict[str, tuple[Points, Points | None]] = {  # what is filled, and what is cut out of it
    "circle": (_ellipse(), None),
    "square": (_rectangle(0.86, 0.86), None),
    "triangle": ([(0.0, -0.9), (1.0, 0.8), (-1.0, 0.8)], None),
    "star": (_polygon(5, valley=0.45), None),
    "heart": (_heart(), None),
    "diamond": ([(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)], None),
    "hexagon": (_polygon(6, turn=np.pi / 6), None),
    "cross": (_cross(), None),
    "ring": (_ellipse(), _ellipse(0.6, 0.6)),
    "crescent": (_ellipse(), _ellipse(0.82, 0.82, x=0.42, y=-0.12)),
    "oval": (_ellipse(1.0, 0.64), None),
    "rectangle": (_rectangle(0.98, 0.58), None),
}
OTHER_NAMES = {
    "oval": "ellipse",
    "diamond": "rhombus",
    "cross": "plus sign",
    "circle": "disc",
    "crescent": "moon shape",
}


@lru_cache(maxsize=256)
def mask(kind: str, side: int, shift: tuple[int, int] = (0, 0)) -> Float[np.ndarray, "side side"]:
    """How much of each pixel of a square the shape covers, 0 to 1. shift: subpixels to the right and down, 0 to 3."""
    fine = Image.new("L", (side * FINER, side * FINER))
    brush = ImageDraw.Draw(fine)
    radius = (side * FINER - FINER) / 2
    filled, cut = OUTLINES[kind]
    for points, tone in ((filled, 255), (cut, 0)):
        if points:
            brush.polygon([(radius * (1 + x) + shift[0], radius * (1 + y) + shift[1]) for x, y in points], fill=tone)
    return np.asarray(fine.reduce(FINER), np.float32) / np.float32(255)
