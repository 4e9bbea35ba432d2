"""Training data of the embedded default model: crops of scenes for the autoencoder, framed images for the UNet."""

from __future__ import annotations

import numpy as np

from distrijax.cli.fidelity.scenes import PLACES, example


def crops(seed: int, step: int) -> np.ndarray:
    """Crops of random scenes: many small ones, and at every fourth step fewer, larger ones."""
    count, side, size = (4, 96, 256) if step % 4 == 3 else (16, 48, 256 if step % 4 == 2 else 128)
    return scene_crops([seed, step], step * 16, count=count, side=side, size=size)


def scene_crops(seeds: list[int], first: int, *, count: int, side: int, size: int) -> np.ndarray:
    """One crop of each of `count` scenes, `[count, side, side, 3]`, -1 to 1; varied colours teach the autoencoder fastest.

    Three crops in four contain the centre of a shape, because backgrounds fill most of every image.
    """
    rng = np.random.default_rng(seeds)
    images = []
    for index in range(first, first + count):
        image, _, scene = example(seeds[0], index, size, size)
        corner = rng.integers(0, size - side + 1, 2)
        if rng.random() < 0.75:
            centre = np.array(PLACES[rng.choice(scene.shapes).place]) * size
            corner = np.clip(centre - rng.integers(side // 4, side - side // 4, 2), 0, size - side).astype(int)
        y, x = corner
        images.append(image[y : y + side, x : x + side])
    return to_pixels(images)


def to_pixels(images: list[np.ndarray]) -> np.ndarray:
    """uint8 images as input of the autoencoder, `[b, h, w, 3]`, -1 to 1."""
    return np.stack(images).astype(np.float32) / 127.5 - 1


def framed(seed: int, index: int, height: int, width: int) -> tuple[np.ndarray, str, list[float]]:
    """A training image, its caption and its time ids; some images are cropped, some enlarged from half the size."""
    rng = np.random.default_rng([seed, index, 1])
    kind = rng.choice(["whole", "crop", "enlarged"], p=[0.9, 0.06, 0.04])
    if kind == "crop":
        tall, wide = height * 5 // 32 * 8, width * 5 // 32 * 8
        top, left = int(rng.integers(0, tall - height + 1)), int(rng.integers(0, wide - width + 1))
        image, caption, _ = example(seed, index, tall, wide)
        return image[top : top + height, left : left + width], caption, [tall, wide, top, left, height, width]
    if kind == "enlarged":
        image, caption, _ = example(seed, index, height // 2, width // 2)
        enlarged = image.repeat(2, 0).repeat(2, 1)
        return enlarged, caption, [height // 2, width // 2, 0, 0, height, width]
    image, caption, _ = example(seed, index, height, width)
    return image, caption, [height, width, 0, 0, height, width]
