"""Scenes of coloured shapes: drawn, captioned, and found again in an image's pixels.

    sample_scene -> Scene -> draw     [h, w, 3]   the training data of the embedded default model
                          -> caption  "a large red circle at the top left, on a striped yellow background"
    found(image, scene)               whether each named shape's colour is where the caption says

`(seed, index)` determines an example, so a data set of any length needs no files. One scene in ten is held out of training.
Shapes are signed distance functions: edges are smooth at any size, and drawing an image takes about a millisecond.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "yellow": (250, 208, 20),
    "green": (25, 145, 65),
    "cyan": (0, 190, 210),
    "blue": (35, 75, 215),
    "purple": (125, 45, 185),
    "white": (248, 248, 248),
    "black": (24, 24, 28),
}

# Two tones each, softer than any shape's colour: a purple star keeps its outline even on a pink or blue ground.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((250, 250, 250), (222, 224, 228)),
    "gray": ((160, 164, 171), (130, 135, 143)),
    "black": ((30, 31, 36), (58, 60, 68)),
    "yellow": ((255, 242, 184), (245, 224, 138)),
    "green": ((186, 224, 178), (146, 198, 140)),
    "blue": ((176, 206, 246), (132, 172, 232)),
    "pink": ((252, 214, 228), (242, 180, 204)),
    "purple": ((214, 196, 238), (182, 156, 218)),
    "orange": ((254, 218, 184), (244, 186, 138)),
}

SIZES: dict[str, float] = {"small": 0.09, "medium": 0.12, "large": 0.15}  # radius / shorter side of the image

PLACES: dict[str, tuple[float, float]] = {  # centre as fractions of the height and of the width
    "at the top left": (0.2, 0.2),
    "at the top": (0.2, 0.5),
    "at the top right": (0.2, 0.8),
    "on the left": (0.5, 0.2),
    "in the center": (0.5, 0.5),
    "on the right": (0.5, 0.8),
    "at the bottom left": (0.8, 0.2),
    "at the bottom": (0.8, 0.5),
    "at the bottom right": (0.8, 0.8),
}

PLACE_RADIUS = 0.15  # radius of a place / shorter side of the image: half the distance to the next place

TEXTURES = ("plain", "striped", "checkered", "dotted", "gradient")


@dataclass(frozen=True)
class Outline:
    """A star-shaped polygon in units of the shape's radius; a regular polygon has its valleys in the middle of its sides.

    Attributes:
        points: Number of tips.
        tip: Distance of the tips from the centre.
        valley: Distance of the valleys from the centre.
        turn: Rotation of the first tip away from straight up, in radians.
        width: Horizontal scale.
        drop: Downward shift, which centres a triangle on its place.
    """

    points: int
    tip: float
    valley: float
    turn: float = 0.0
    width: float = 1.0
    drop: float = 0.0

    @property
    def area(self) -> float:
        return self.points * self.tip * self.valley * float(np.sin(np.pi / self.points)) * self.width

    def distance(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Signed distance to the outline, negative inside; exact near the sides, as smooth edges need.

        Args:
            y: Downwards, `[h, 1]` or `[h, w]`, with the outline's centre at 0 and its size as the unit.
            x: To the right, `[1, w]` or `[h, w]`, in the same unit.

        Returns:
            `[h, w]`, in the same unit.
        """
        x, y = x / np.float32(self.width), y - np.float32(self.drop)
        half = np.pi / self.points
        # Folding the plane into the wedge between a tip and a valley leaves one straight side to measure.
        angle = np.arctan2(x, -y) - np.float32(self.turn)
        angle = np.abs(np.mod(angle + np.float32(half), np.float32(2 * half)) - np.float32(half))
        radius = np.hypot(x, y)
        along, across = radius * np.cos(angle), radius * np.sin(angle)
        rise, run = self.valley * np.sin(half), self.tip - self.valley * np.cos(half)
        return (rise * (along - self.tip) + run * across) / np.float32(np.hypot(rise, run))


OUTLINES: dict[str, Outline | None] = {  # None is the circle
    "circle": None,
    "square": Outline(4, 1.25, 1.25 * np.cos(np.pi / 4), turn=np.pi / 4),
    "triangle": Outline(3, 1.4, 0.7, drop=0.3),
    "star": Outline(5, 1.3, 0.62, drop=0.08),
    "diamond": Outline(4, 1.3, 1.3 * np.cos(np.pi / 4), width=0.78),
}


@dataclass(frozen=True)
class Shape:
    """One shape; its attributes are keys of `OUTLINES`, `COLOURS`, `SIZES` and `PLACES`."""

    kind: str
    colour: str
    size: str
    place: str

    @property
    def area(self) -> float:
        """Area in units of the image's shorter side squared."""
        outline = OUTLINES[self.kind]
        return SIZES[self.size] ** 2 * (np.pi if outline is None else outline.area)


@dataclass(frozen=True)
class Scene:
    """One to three shapes of different colours in different places, on a background of another colour."""

    shapes: tuple[Shape, ...]
    background: str
    texture: str

    @property
    def held_out(self) -> bool:
        """Whether training leaves out this combination of colours, kinds and places: one combination in ten."""
        key = ";".join(sorted(f"{s.colour},{s.kind},{s.place}" for s in self.shapes))
        return zlib.crc32(key.encode()) % 10 == 0


def sample_scene(rng: np.random.Generator) -> Scene:
    """Samples a scene, held out of training or not.

    Args:
        rng: Source of all choices.
    """
    count = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    places = rng.choice(list(PLACES), count, replace=False)
    colours = rng.choice(list(COLOURS), count, replace=False)
    kinds = rng.choice(list(OUTLINES), count)
    sizes = rng.choice(list(SIZES), count, p=[0.25, 0.4, 0.35])
    shapes = tuple(Shape(*map(str, names)) for names in zip(kinds, colours, sizes, places, strict=True))
    background = rng.choice([name for name in BACKGROUNDS if name not in colours])
    return Scene(shapes, str(background), str(rng.choice(TEXTURES)))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describes the scene, with shapes in random order; one caption in ten leaves the background out.

    Args:
        scene: Its shapes, background and texture are described.
        rng: Source of the order and of the wording.
    """
    phrases = [_shape_phrase(scene.shapes[i], rng) for i in rng.permutation(len(scene.shapes))]
    words = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    return words if rng.random() < 0.1 else f"{words}, on {_background_phrase(scene, rng)}"


def _shape_phrase(shape: Shape, rng: np.random.Generator) -> str:
    size = "" if shape.size == "medium" else shape.size
    if size == "large" and rng.random() < 0.2:
        size = "big"
    return f"{_with_article(size, shape.colour, shape.kind)} {shape.place}"


def _background_phrase(scene: Scene, rng: np.random.Generator) -> str:
    texture = "" if scene.texture == "plain" and rng.random() < 0.5 else scene.texture
    adjectives = (scene.background, texture) if rng.random() < 0.2 else (texture, scene.background)
    return _with_article(*adjectives, "background")


def _with_article(*words: str) -> str:
    phrase = " ".join(word for word in words if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def all_captions_vocabulary() -> list[str]:
    """Every word and punctuation mark that a caption can contain, sorted."""
    phrases = [*COLOURS, *BACKGROUNDS, *SIZES, *PLACES, *OUTLINES, *TEXTURES, "a an and , on big background"]
    return sorted({word for phrase in phrases for word in phrase.split()} - {"medium"})


def draw(scene: Scene, height: int, width: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    """Draws the scene as an sRGB image, with slightly varied positions, sizes and shades.

    The 3x3 grid of places stretches with the image; shapes do not.

    Args:
        scene: The scene.
        height: Pixels, a multiple of 8 from 64 to 1024.
        width: Pixels, likewise.
        rng: Source of the variation.

    Raises:
        ValueError: For another height or width.
    """
    if any(side % 8 or not 64 <= side <= 1024 for side in (height, width)):
        raise ValueError(f"the image size is {height}x{width}; height and width must be multiples of 8 from 64 to 1024")
    light, dark = (np.float32(tone) for tone in BACKGROUNDS[scene.background])
    pattern = _pattern(scene.texture, height, width)[..., None]
    image = (light + (dark - light) * pattern) * _vignette(height, width) * np.float32(rng.uniform(0.96, 1.03))
    for shape in scene.shapes:
        _draw_shape(image, shape, rng)
    return np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)


def _draw_shape(image: np.ndarray, shape: Shape, rng: np.random.Generator) -> None:
    """Draws one shape with its soft shadow into `image`, changing only the square around it."""
    height, width = image.shape[:2]
    side = min(height, width)
    radius = side * SIZES[shape.size] * rng.uniform(0.93, 1.07)
    centre_y, centre_x = np.array(PLACES[shape.place]) * (height, width) + rng.uniform(-0.015, 0.015, 2) * side
    reach = 1.6 * radius + 2
    rows = slice(max(0, int(centre_y - reach)), min(height, int(centre_y + reach) + 1))
    columns = slice(max(0, int(centre_x - reach)), min(width, int(centre_x + reach) + 1))
    y = ((np.arange(rows.start, rows.stop) + 0.5 - centre_y) / radius).astype(np.float32)[:, None]
    x = ((np.arange(columns.start, columns.stop) + 0.5 - centre_x) / radius).astype(np.float32)[None, :]

    window = image[rows, columns]
    shadow = np.clip(0.5 - _distance(shape.kind, y - np.float32(0.1), x - np.float32(0.06)) / np.float32(0.3), 0, 1)
    window *= (1 - np.float32(0.28) * shadow)[..., None]
    highlight = np.exp(-((x + np.float32(0.4)) ** 2 + (y + np.float32(0.45)) ** 2))  # light comes from the top left
    shade = (np.float32(0.9) + np.float32(0.16) * highlight) * np.float32(rng.uniform(0.96, 1.04))
    colour = np.float32(COLOURS[shape.colour]) * shade[..., None]
    coverage = np.clip(0.5 - _distance(shape.kind, y, x) * np.float32(radius), 0, 1)[..., None]
    window += (colour - window) * coverage


def _distance(kind: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    outline = OUTLINES[kind]
    return np.hypot(x, y) - np.float32(1) if outline is None else outline.distance(y, x)


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres measured from the middle of the image, in units of its shorter side."""
    side = min(height, width)
    y = (np.arange(height) + 0.5 - height / 2) / side
    x = (np.arange(width) + 0.5 - width / 2) / side
    return y.astype(np.float32)[:, None], x.astype(np.float32)[None, :]


@lru_cache(maxsize=64)
def _pattern(texture: str, height: int, width: int) -> Float[np.ndarray, "h w"]:
    """Share of the background's second tone in each pixel, 0 to 1; depends on the size alone, hence the cache."""
    y, x = _grid(height, width)
    sharpness = min(height, width)
    if texture == "plain":
        amount = np.full((height, width), 0.15)
    elif texture == "striped":
        amount = 0.5 + _triangle_wave(4 * (x + y)) / (4 * np.sqrt(2)) * sharpness
    elif texture == "checkered":
        across, down = _triangle_wave(3 * x), _triangle_wave(3 * y)
        amount = 0.5 + np.sign(across * down) * np.minimum(np.abs(across), np.abs(down)) / 3 * sharpness
    elif texture == "dotted":
        dx, dy = np.mod(7 * x, 1) - 0.5, np.mod(7 * y, 1) - 0.5
        amount = 0.5 + (0.27 - np.hypot(dx, dy)) / 7 * sharpness
    else:  # gradient, darker towards the bottom
        amount = np.broadcast_to((y - y[0]) / (y[-1] - y[0]) * 1.2 - 0.1, (height, width))
    pattern = np.clip(amount, 0, 1).astype(np.float32)
    pattern.setflags(write=False)
    return pattern


def _triangle_wave(phase: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 and slope 1, whose zeros can be smoothed like the edges of a shape."""
    return 0.25 - np.abs(np.mod(phase, 1) - 0.5)


@lru_cache(maxsize=16)
def _vignette(height: int, width: int) -> Float[np.ndarray, "h w 1"]:
    y, x = _grid(height, width)
    shade = (1 - 0.16 * (np.square(y / np.ptp(y)) + np.square(x / np.ptp(x))))[..., None].astype(np.float32)
    shade.setflags(write=False)
    return shade


def example(seed: int, index: int, height: int, width: int) -> tuple[UInt8[np.ndarray, "h w 3"], str, Scene]:
    """Training image number `index`, its caption and its scene; caption and scene are the same at every size.

    Args:
        seed: Of the whole set of examples.
        index: Number of the example, from 0.
        height: Pixels.
        width: Pixels.
    """
    return _example(seed, index, height, width, held_out=False)


def held_out_example(seed: int, index: int, height: int, width: int) -> tuple[UInt8[np.ndarray, "h w 3"], str, Scene]:
    """An example of the scenes held out of training; arguments and results as for `example`.

    Args:
        seed: Of the whole set of examples.
        index: Number of the example, from 0.
        height: Pixels.
        width: Pixels.
    """
    return _example(seed, index, height, width, held_out=True)


def _example(
    seed: int, index: int, height: int, width: int, held_out: bool
) -> tuple[UInt8[np.ndarray, "h w 3"], str, Scene]:
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    while scene.held_out != held_out:
        scene = sample_scene(rng)
    words = caption(scene, rng)
    return draw(scene, height, width, rng), words, scene


def found(image: np.ndarray, scene: Scene) -> list[bool]:
    """For each shape of the scene, in order: whether the image has the shape's colour in the shape's place.

    Every pixel is assigned to the nearest of the colours of shapes and backgrounds. In the disc around a shape's place, a
    colour counts where it is at least three times as dense as in the empty part of the image; anything else is background,
    even of the shape's own colour. The shape is found when its colour is the most frequent of those that count and covers
    at least 35 % of the shape's area. The shape's kind and size and the image's background are not judged.

    Args:
        image: `[h, w, 3]`, uint8, or float from 0 to 1.
        scene: What the image should show.
    """
    labels = _nearest_colour(image)
    discs = [_disc(shape.place, *labels.shape) for shape in scene.shapes]
    elsewhere = _density(labels[~np.any(discs, axis=0)])
    results = []
    for shape, disc in zip(scene.shapes, discs, strict=True):
        here = _density(labels[disc])
        here[here < 3 * elsewhere] = 0
        colour = list(COLOURS).index(shape.colour)
        enough = 0.35 * shape.area / (np.pi * PLACE_RADIUS**2)
        results.append(bool(here.argmax() == colour and here[colour] >= enough))
    return results


def copies(image: np.ndarray, scene: Scene) -> int:
    """How many blobs of the shapes' colours lie outside of the shapes' places: copies beside what was asked for.

    A blob is a connected region that is at least as large as a tenth of the shape of its colour.

    Args:
        image: `[h, w, 3]`, uint8, or float from 0 to 1.
        scene: What the image should show.
    """
    labels = _nearest_colour(image)
    outside = ~np.any([_disc(shape.place, *labels.shape) for shape in scene.shapes], axis=0)
    count = 0
    for shape in scene.shapes:
        blobs, number = ndimage.label((labels == list(COLOURS).index(shape.colour)) & outside)
        least = 0.1 * shape.area * min(labels.shape) ** 2
        count += int(np.sum(np.bincount(blobs.ravel(), minlength=number + 1)[1:] >= least))
    return count


def sharpness(image: np.ndarray) -> float:
    """The 99.5th percentile of differences between neighbouring pixels, of the mean of the colours.

    Args:
        image: `[h, w, 3]`, float from 0 to 1.
    """
    gray = np.asarray(image, np.float32).mean(-1)
    steps = [np.abs(np.diff(gray, axis=axis)).ravel() for axis in (0, 1)]
    return float(np.percentile(np.concatenate(steps), 99.5))


# White and black look alike as shapes and as backgrounds, so these two have no soft tones of their own.
_SOFT_TONES = [tone for name, tones in BACKGROUNDS.items() if name not in ("white", "black") for tone in tones]
_SOFT = -1


def _disc(place: str, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    y, x = _grid(height, width)
    down, across = PLACES[place]
    side = min(height, width)
    return np.hypot(y - (down - 0.5) * height / side, x - (across - 0.5) * width / side) < PLACE_RADIUS


def _density(labels: np.ndarray) -> np.ndarray:
    """Share of the labels that each of COLOURS has."""
    return np.bincount(labels[labels != _SOFT], minlength=len(COLOURS)) / len(labels)


def _nearest_colour(image: np.ndarray) -> Int[np.ndarray, "h w"]:
    """Index into COLOURS of each pixel, or `_SOFT` where a tone of a background is nearer."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image has shape {list(image.shape)}; give [height, width, 3]")
    values = image / 255 if image.dtype == np.uint8 else np.clip(np.nan_to_num(image.astype(np.float64)), 0, 1)
    palette = _perceptual(np.array([*COLOURS.values(), *_SOFT_TONES]) / 255)
    pixels = _perceptual(values)
    # |pixel - colour|^2 without |pixel|^2, which is the same for every colour.
    labels = np.argmin(np.sum(palette**2, axis=-1) - 2 * pixels @ palette.T, axis=-1)
    return np.where(labels < len(COLOURS), labels, _SOFT)


_RGB_TO_CONES = np.array(
    [
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ]
)
_CONES_TO_LAB = np.array(
    [
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ]
)


def _perceptual(srgb: Float[np.ndarray, "*pixels 3"]) -> Float[np.ndarray, "*pixels 3"]:
    """Oklab (Ottosson 2020, "A perceptual color space for image processing") with lightness at half its weight.

    With the full weight a shaded side of a shape could pass for another colour.
    """
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _RGB_TO_CONES) @ _CONES_TO_LAB * (0.5, 1, 1)
