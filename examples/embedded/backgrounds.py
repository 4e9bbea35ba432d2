"""Backgrounds of the scenes: soft colours and patterns, and simple landscapes, at any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

TONES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # two of each, softer than any shape's colour
    "white": ((251, 251, 252), (226, 228, 233)),
    "gray": ((176, 180, 187), (140, 145, 154)),
    "black": ((26, 27, 33), (56, 58, 68)),
    "red": ((250, 150, 145), (226, 106, 106)),
    "orange": ((255, 205, 150), (247, 170, 108)),
    "yellow": ((255, 240, 170), (247, 220, 118)),
    "green": ((182, 226, 172), (130, 196, 130)),
    "blue": ((172, 208, 250), (118, 168, 236)),
    "purple": ((214, 190, 244), (174, 140, 222)),
    "pink": ((255, 214, 230), (246, 172, 204)),
    "brown": ((206, 170, 136), (172, 130, 96)),
}
PATTERNS = ("plain", "gradient", "striped", "dotted", "checkered")
HORIZONS = {"meadow": 0.62, "beach": 0.66, "sea": 0.55, "snow": 0.6, "desert": 0.6, "table": 0.64}
"""Landscapes with a ground, and where it begins, as a fraction of the height."""
LANDSCAPES = (*HORIZONS, "sky", "night", "space")

Canvas = Float[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Background:
    """kind: one of PATTERNS or LANDSCAPES. colour: one of TONES for patterns and for a table, else empty."""

    kind: str
    colour: str = ""


def sample_background(rng: np.random.Generator, avoid: frozenset[str] = frozenset()) -> Background:
    """A random one; its colour is none of `avoid`."""
    if rng.random() < 0.4:
        kind = str(rng.choice(LANDSCAPES))
        wooden = kind == "table" and rng.random() < 0.5
        return Background(kind, "" if kind != "table" or wooden else str(rng.choice(_free(avoid))))
    return Background(str(rng.choice(PATTERNS, p=[0.45, 0.2, 0.13, 0.12, 0.1])), str(rng.choice(_free(avoid))))


def _free(avoid: frozenset[str]) -> list[str]:
    return [name for name in TONES if name not in avoid]


def draw_background(background: Background, height: int, width: int, rng: np.random.Generator) -> Canvas:
    """Float pixels 0 to 255 with the random details of `rng`, the same at any size."""
    y = ((np.arange(height) + 0.5) / height).astype(np.float32)[:, None]
    x = ((np.arange(width) + 0.5) / min(height, width)).astype(np.float32)[None, :]
    if background.kind in PATTERNS:
        return _pattern(background, y, x, min(height, width), rng)
    return _DRAW[background.kind](y, x, height, background, rng)


def _pattern(background: Background, y: np.ndarray, x: np.ndarray, side: int, rng: np.random.Generator) -> Canvas:
    light, dark = (np.float32(tone) for tone in TONES[background.colour])
    square = y * np.float32(y.shape[0] / side)
    count, phase = rng.uniform(3, 8), rng.uniform(0, 1)
    match background.kind:
        case "plain":
            amount = 0.25 + 0.12 * (y - 0.5) + 0 * x
        case "gradient":
            angle = rng.uniform(0, 2 * np.pi)
            amount = 0.5 + 0.8 * (np.cos(angle) * (y - 0.5) + np.sin(angle) * (x - x.mean()))
        case "striped":
            angle = rng.choice([0, np.pi / 2, np.pi / 4])
            amount = 0.5 + _zigzag(count * (np.cos(angle) * square + np.sin(angle) * x) + phase) / count * side
        case "checkered":
            down, across = _zigzag(count * 0.6 * square), _zigzag(count * 0.6 * x + phase)
            amount = 0.5 + np.sign(across * down) * np.minimum(np.abs(across), np.abs(down)) / count * 1.6 * side
        case _:
            down, across = np.mod(count * square, 1) - 0.5, np.mod(count * x + phase, 1) - 0.5
            amount = 0.5 + (0.27 - np.hypot(down, across)) / count * side
    return light + (dark - light) * np.clip(amount, 0, 1).astype(np.float32)[..., None]


def _zigzag(phase: np.ndarray) -> np.ndarray:
    """Of period 1 and slope 1, so that its zeros can be smoothed like the edges of a shape."""
    return 0.25 - np.abs(np.mod(phase, 1) - 0.5)


def _blend(y: np.ndarray, x: np.ndarray, top: tuple, bottom: tuple) -> Canvas:
    amount = np.clip(np.broadcast_to(y, (y.shape[0], x.shape[1])), 0, 1)[..., None]
    return np.float32(top) + (np.float32(bottom) - np.float32(top)) * amount


def _cover(canvas: Canvas, amount: np.ndarray, paint: np.ndarray | tuple) -> None:
    canvas += (np.float32(paint) - canvas) * np.clip(amount, 0, 1).astype(np.float32)[..., None]


def _hills(canvas: Canvas, y, x, height: int, line: float, paint: tuple, rng: np.random.Generator, rise: float = 0.03):
    """Everything below a wavy line, darker towards the bottom."""
    wave = line + rise * (np.sin(x * rng.uniform(2, 5) + rng.uniform(0, 6)) + 0.5 * np.sin(x * 9 + rng.uniform(0, 6)))
    shade = 1.06 - 0.28 * np.clip((y - line) / (1 - line), 0, 1) + 0 * x
    _cover(canvas, (y - wave) * height + 0.5, np.float32(paint) * shade[..., None].astype(np.float32))


def _clouds(canvas: Canvas, y, x, height: int, count: int, rng: np.random.Generator, lowest: float = 0.35) -> None:
    for _ in range(count):
        down, across, size = rng.uniform(0.08, lowest), rng.uniform(0, x[0, -1]), rng.uniform(0.05, 0.1)
        for _ in range(4):
            dx, dy, radius = rng.uniform(-1.4, 1.4) * size, rng.uniform(-0.3, 0.3) * size, size * rng.uniform(0.5, 0.9)
            inside = radius - np.hypot(x - across - dx, 1.3 * (y - down - dy))
            _cover(canvas, 0.85 * np.clip(inside * 14 / size * 0.1, 0, 1), (252, 253, 255))


def _stars(canvas: Canvas, y, x, count: int, rng: np.random.Generator, lowest: float = 1.0) -> None:
    shape = canvas.shape[:2]
    side = min(shape)
    for _ in range(count):
        down, across, radius = rng.uniform(0, lowest), rng.uniform(0, x[0, -1]), rng.uniform(0.004, 0.009)
        row, column, reach = int(down * shape[0]), int(across * side), int(0.02 * side) + 2
        rows, columns = slice(max(0, row - reach), row + reach), slice(max(0, column - reach), column + reach)
        distance = np.hypot(x[:, columns] - across, (y[rows] - down) * shape[0] / side)
        _cover(canvas[rows, columns], (radius - distance) * side + 0.5, (255, 250, 225))


def _meadow(y, x, height, background, rng) -> Canvas:
    canvas = _blend(y / np.float32(0.7), x, (122, 190, 248), (214, 238, 252))
    _clouds(canvas, y, x, height, int(rng.integers(0, 3)), rng)
    _hills(canvas, y, x, height, 0.57, (126, 196, 104), rng, rise=0.045)
    _hills(canvas, y, x, height, 0.66, (92, 176, 74), rng, rise=0.02)
    return canvas


def _sky(y, x, height, background, rng) -> Canvas:
    canvas = _blend(y, x, (88, 166, 242), (206, 234, 252))
    _clouds(canvas, y, x, height, int(rng.integers(2, 6)), rng, lowest=0.95)
    return canvas


def _night(y, x, height, background, rng) -> Canvas:
    canvas = _blend(y, x, (14, 18, 52), (46, 54, 112))
    _stars(canvas, y, x, int(rng.integers(18, 36)), rng, lowest=0.75)
    _hills(canvas, y, x, height, 0.78, (22, 34, 58), rng)
    return canvas


def _space(y, x, height, background, rng) -> Canvas:
    canvas = _blend(y, x, (10, 8, 26), (34, 16, 58))
    _stars(canvas, y, x, int(rng.integers(30, 60)), rng)
    return canvas


def _sea(y, x, height, background, rng) -> Canvas:
    canvas = _blend(y / np.float32(0.55), x, (134, 198, 250), (224, 242, 252))
    _clouds(canvas, y, x, height, int(rng.integers(0, 3)), rng)
    for line, paint in ((0.55, (58, 150, 214)), (0.68, (40, 128, 200)), (0.82, (28, 108, 184))):
        wave = line + 0.012 * np.abs(np.sin(x * 14 + rng.uniform(0, 6)))
        _cover(canvas, (y - wave) * height + 0.5, paint)
    return canvas


def _beach(y, x, height, background, rng) -> Canvas:
    canvas = _blend(y / np.float32(0.5), x, (126, 200, 250), (222, 242, 252))
    _cover(canvas, (y - 0.46 + 0 * x) * height + 0.5, (44, 158, 206))
    _hills(canvas, y, x, height, 0.655, (250, 250, 246), rng, rise=0.012)
    _hills(canvas, y, x, height, 0.672, (244, 216, 158), rng, rise=0.012)
    return canvas


def _snow(y, x, height, background, rng) -> Canvas:
    canvas = _blend(y / np.float32(0.7), x, (164, 196, 230), (222, 234, 246))
    _hills(canvas, y, x, height, 0.56, (236, 243, 252), rng, rise=0.04)
    _hills(canvas, y, x, height, 0.66, (246, 250, 255), rng, rise=0.02)
    _stars(canvas, y, x, int(rng.integers(20, 45)), rng)
    return canvas


def _desert(y, x, height, background, rng) -> Canvas:
    canvas = _blend(y / np.float32(0.65), x, (250, 196, 120), (254, 234, 190))
    _hills(canvas, y, x, height, 0.56, (226, 164, 96), rng, rise=0.05)
    _hills(canvas, y, x, height, 0.66, (238, 184, 112), rng)
    return canvas


def _table(y, x, height, background, rng) -> Canvas:
    wall = np.float32(((238, 230, 218), (222, 232, 236), (236, 222, 226))[rng.integers(3)])
    canvas = _blend(y, x, tuple(wall), tuple(wall * 0.93))
    light, dark = TONES[background.colour] if background.colour else ((190, 134, 84), (150, 98, 58))
    _cover(canvas, (y - 0.6 + 0 * x) * height + 0.5, np.float32(dark) * np.float32(0.86))
    _cover(canvas, (y - 0.625 + 0 * x) * height + 0.5, np.float32(light))
    if not background.colour:
        for line in (0.72, 0.84, 0.95):
            _cover(canvas, 0.8 - np.abs(y - line + 0 * x) * height * 0.5, np.float32(dark))
    return canvas


_DRAW: dict[str, Callable[..., Canvas]] = {
    "meadow": _meadow,
    "beach": _beach,
    "sea": _sea,
    "snow": _snow,
    "desert": _desert,
    "table": _table,
    "sky": _sky,
    "night": _night,
    "space": _space,
}
