"""Bicubic resizing of feature maps on bands of rows, as torch's `interpolate(mode="bicubic", align_corners=False)`."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distrijax.parallel.bands import Bands
from distrijax.parallel.exchange import Exchange

SHARPNESS = -0.75
"""The parameter `a` of torch's cubic kernel."""


@functools.cache
def bicubic_weights(size: int, wanted: int) -> Float[np.ndarray, "wanted size"]:
    """The weight of each pixel of a line in each pixel of the resized line; beyond the ends, the last pixel counts again.

    Args:
        size: Pixels of the line.
        wanted: Pixels of the resized line.

    References:
        Keys, "Cubic convolution interpolation for digital image processing", 1981.
    """
    centers = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    first = np.floor(centers).astype(int)
    weights = np.zeros((wanted, size), np.float64)
    for tap in range(-1, 3):
        np.add.at(
            weights, (np.arange(wanted), np.clip(first + tap, 0, size - 1)), _cubic(np.abs(centers - first - tap))
        )
    return weights.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    a, d = SHARPNESS, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def resize(
    x: Float[Array, "b h w c"], exchange: Exchange, name: str, rows: tuple[int, int], columns: int, bands: Bands
) -> Float[Array, "b q v c"]:
    """A band of a map, in another size.

    Args:
        x: The band.
        exchange: Answers for the rest of the map.
        name: As that of a layer.
        rows: Of the whole map, and of the whole resized one.
        columns: Of the resized map.
        bands: How the resized map is divided.
    """
    x = exchange.resample(name, x, bicubic_weights(*rows), bands)
    weights = jnp.asarray(bicubic_weights(x.shape[2], columns), x.dtype)
    return jnp.einsum("vw,bqwc->bqvc", weights, x)
