"""Scenes of objects and shapes on backgrounds: sampled, drawn at any size, and held out of training or not.

    sample_scene -> Scene -> draw     [h, w, 3]
                          -> captions.caption   "a large green star in the top left corner"

Everything follows from `(seed, index)`, so that a data set of any length needs no files but the artwork.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from embedded.artwork import OBJECTS, Artwork
from embedded.backgrounds import HORIZONS, PATTERNS, Background, draw_background, sample_background
from embedded.outlines import FINER, OUTLINES, mask

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 34, 40),
    "orange": (250, 128, 20),
    "yellow": (252, 208, 20),
    "green": (30, 154, 66),
    "blue": (34, 86, 220),
    "purple": (126, 46, 186),
    "pink": (246, 104, 172),
    "brown": (124, 72, 36),
    "black": (22, 22, 27),
    "white": (250, 250, 250),
    "gray": (128, 132, 140),
}
SIZES = {"small": 0.62, "": 1.0, "large": 1.45}
PLACES: dict[str, tuple[float, float]] = {  # centre as fractions of the height and of the width
    "top left": (0.22, 0.22),
    "top": (0.22, 0.5),
    "top right": (0.22, 0.78),
    "left": (0.5, 0.22),
    "center": (0.5, 0.5),
    "right": (0.5, 0.78),
    "bottom left": (0.78, 0.22),
    "bottom": (0.78, 0.5),
    "bottom right": (0.78, 0.78),
}
PLACED_RADIUS = 0.16  # of a thing at a place, and
ALONE_RADIUS = 0.30  # of one by itself / the shorter side of the picture
RELATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {  # y, x and radius of both
    "to the left of": ((0.52, 0.27, 0.19), (0.52, 0.73, 0.19)),
    "to the right of": ((0.52, 0.73, 0.19), (0.52, 0.27, 0.19)),
    "above": ((0.28, 0.5, 0.18), (0.73, 0.5, 0.18)),
    "below": ((0.73, 0.5, 0.18), (0.28, 0.5, 0.18)),
    "in front of": ((0.66, 0.56, 0.19), (0.46, 0.45, 0.31)),
}


@dataclass(frozen=True)
class Thing:
    """An object or a shape. colour: none for an object as it is. place: of PLACES, or empty. y, x: centre, as fractions.

    radius: of the circle about it / the shorter side.
    """

    kind: str
    colour: str
    size: str
    place: str
    y: float
    x: float
    radius: float

    @property
    def is_shape(self) -> bool:
        return self.kind in OUTLINES

    @property
    def key(self) -> str:
        return f"{self.colour},{self.kind},{self.place}"


@dataclass(frozen=True)
class Scene:
    """One to three things, first the one that is spoken of first, on a background.

    layout: "alone", "placed" (each at a place of its own), "row" (from left to right), "count" (the same thing several times),
    or one of RELATIONS between the first and the second.
    """

    things: tuple[Thing, ...]
    layout: str
    background: Background

    @property
    def held_out(self) -> bool:
        """Whether training must never see this combination of colours, kinds and places: one in ten.

        A single object in its own colours and in no named place is never held out: its name has to be learnt from it.
        """
        if self.layout == "alone" and not self.things[0].colour and not self.things[0].place:
            return False
        relation = self.layout if self.layout in RELATIONS else ""
        key = ";".join([relation, *sorted(thing.key for thing in self.things)])
        return zlib.crc32(key.encode()) % 10 == 0


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene, held out of training or not."""
    layout = str(rng.choice(["alone", "placed", "row", "count", "relation"], p=[0.45, 0.3, 0.1, 0.05, 0.1]))
    if layout == "relation":
        layout = str(rng.choice(list(RELATIONS)))
    looks = _looks(layout, rng)
    things = tuple(Thing(*look, *where) for look, where in zip(looks, _positions(layout, len(looks), rng), strict=True))
    return Scene(things, layout, sample_background(rng, frozenset(thing.colour for thing in things)))


def _looks(layout: str, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Kind, colour and size of each thing."""
    if layout == "count":
        return [_look(rng)] * int(rng.integers(2, 4))
    count = {"alone": 1, "placed": int(rng.choice([1, 2, 3], p=[0.55, 0.35, 0.1])), "row": int(rng.integers(2, 4))}
    looks: list[tuple[str, str, str]] = []
    while len(looks) < count.get(layout, 2):
        look = _look(rng)
        if all(look[0] != kind and (not colour or look[1] != colour) for kind, colour, _ in looks):
            looks.append(look)
    return looks


def _look(rng: np.random.Generator) -> tuple[str, str, str]:
    size = str(rng.choice(list(SIZES), p=[0.15, 0.65, 0.2]))
    if rng.random() < 0.35:
        return str(rng.choice(list(OUTLINES))), str(rng.choice(list(COLOURS))), size
    painted = rng.random() < 0.1
    return str(rng.choice(list(OBJECTS))), str(rng.choice(list(COLOURS))) if painted else "", size


def _positions(layout: str, count: int, rng: np.random.Generator) -> list[tuple[str, float, float, float]]:
    """Place, y, x and radius of each thing, before its size is applied."""
    if layout == "alone":
        return [("", 0.52, 0.5, ALONE_RADIUS)]
    if layout == "placed":
        names = rng.choice(list(PLACES), count, replace=False)
        return [(str(name), *PLACES[str(name)], PLACED_RADIUS) for name in names]
    if layout in ("row", "count"):
        return [("", 0.52, (i + 0.5) / count, 0.2 if count == 2 else 0.15) for i in range(count)]
    return [("", *where) for where in RELATIONS[layout]]


def draw(
    scene: Scene, artwork: Artwork, height: int, width: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """The scene as sRGB pixels, with slightly varied positions, sizes and shades; the same at any size, stretched places aside."""
    canvas = draw_background(scene.background, height, width, rng)
    canvas *= np.float32(rng.uniform(0.95, 1.03))
    side = min(height, width)
    things = reversed(scene.things) if scene.layout == "in front of" else scene.things
    for thing in things:
        radius = thing.radius * SIZES[thing.size] * rng.uniform(0.93, 1.07)
        jitter = rng.uniform(-0.02, 0.02, 2) * (2 if scene.layout == "alone" else 1)
        y, x = (np.array((thing.y, thing.x)) + jitter) * (height, width) / side
        if scene.layout in ("row", "count"):
            radius = min(radius, 0.46 * width / side / len(scene.things))
        if scene.layout == "placed" and len(scene.things) > 1:
            radius = min(radius, 0.19)
        radius = min(radius, 0.47)
        y, x = (float(np.clip(v, radius + 0.01, most / side - radius - 0.01)) for v, most in ((y, height), (x, width)))
        pixels, alpha = _paint(thing, artwork, radius * side, rng)
        _shadow(canvas, alpha, y * side, x * side, radius * side, scene.background)
        _paste(canvas, pixels, alpha, y * side, x * side)
    return np.clip(canvas + np.float32(0.5), 0, 255).astype(np.uint8)


def _paint(thing: Thing, artwork: Artwork, radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours [h, w, 3] and opacity [h, w] of a thing, centred."""
    if thing.is_shape:
        side = max(4, round(2 * radius))
        shift = tuple(int(s) for s in rng.integers(0, FINER, 2))
        ramp = np.linspace(-1, 1, side, dtype=np.float32)
        shade = 1.0 - 0.07 * (0.8 * ramp[:, None] + 0.6 * ramp[None, :])  # light comes from the top left
        colour = np.float32(COLOURS[thing.colour]) * np.float32(rng.uniform(0.95, 1.03))
        return np.clip(colour * shade[..., None], 0, 255), mask(thing.kind, side, shift)
    picture = artwork.picture(thing.kind)
    pixels = Image.fromarray(picture)
    scale = 1.9 * radius / max(picture.shape[:2])
    size = [max(4, round(n * scale)) for n in (picture.shape[1], picture.shape[0])]
    whole = pixels.convert("RGBa").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGBA")
    values = np.asarray(whole, np.float32)
    colours = _tinted(values[..., :3], thing.colour) if thing.colour else values[..., :3]
    return colours, values[..., 3] / np.float32(255)


def _tinted(pixels: np.ndarray, colour: str) -> np.ndarray:
    """All in one colour, light and dark as before."""
    light = pixels @ np.float32((0.299, 0.587, 0.114)) / np.float32(255)
    target = np.float32(COLOURS[colour])
    below = target * np.clip(light / 0.62, 0, 1)[..., None]
    return below + (255 - target) * (0.85 * np.clip((light - 0.62) / 0.38, 0, 1) ** 1.5)[..., None]


def _shadow(canvas: np.ndarray, alpha: np.ndarray, y: float, x: float, radius: float, background: Background) -> None:
    """A soft one: of the outline on a pattern, a flat ellipse below on a ground, none in the air."""
    if background.kind in PATTERNS:
        blur = max(1, round(0.09 * radius))
        padded = np.pad(np.uint8(alpha * 255), 3 * blur)
        soft = np.asarray(Image.fromarray(padded).filter(ImageFilter.BoxBlur(blur)).filter(ImageFilter.BoxBlur(blur)))
        _paste(canvas, np.float32((10, 10, 30)), soft * np.float32(0.3 / 255), y + 0.1 * radius, x + 0.06 * radius)
    elif background.kind in HORIZONS and background.kind != "sea":
        half_height, half_width = alpha.shape[0] / 2, alpha.shape[1] / 2
        down = np.linspace(-1.3, 1.3, max(4, round(0.36 * half_width)), dtype=np.float32)[:, None]
        across = np.linspace(-1.3, 1.3, max(4, round(2.4 * half_width)), dtype=np.float32)[None, :]
        soft = np.clip((1.3 - np.hypot(down, across)) / 0.6, 0, 1) * np.float32(0.32)
        _paste(canvas, np.float32((10, 10, 30)), soft, y + half_height * 0.97, x)


def _paste(canvas: np.ndarray, pixels: np.ndarray, alpha: np.ndarray, y: float, x: float) -> None:
    """Blends pixels centred at (y, x) over the canvas, as far as they lie on it."""
    top, left = round(y - alpha.shape[0] / 2), round(x - alpha.shape[1] / 2)
    rows = slice(max(0, top), min(canvas.shape[0], top + alpha.shape[0]))
    columns = slice(max(0, left), min(canvas.shape[1], left + alpha.shape[1]))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    inner = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
    window = canvas[rows, columns]
    window += ((pixels[inner] if pixels.ndim == 3 else pixels) - window) * alpha[inner][..., None]


def scene_of(seed: int, index: int, *, held_out: bool = False) -> tuple[Scene, np.random.Generator]:
    """Scene number `index`, of those held out or of the others, and the generator that draws and captions it."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    while scene.held_out != held_out:
        scene = sample_scene(rng)
    return scene, rng
