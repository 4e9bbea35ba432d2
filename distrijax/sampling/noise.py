"""Noise of images: random keys, and normal numbers drawn row by row, so that they are the same on any mesh."""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, UInt32

from distrijax.parallel.collectives import first_row
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import DATA


class Stream(enum.IntEnum):
    """Where the numbers of an image's noise begin, so that two passes over one image do not share noise.

    The stream's own number is the noise that the pass begins with, and the numbers after it are those of its steps.
    """

    TEXT = 0
    """A call that begins with noise alone."""
    IMAGE = 2**30
    """A call that begins with an image to which noise is added, or a second pass after one from text."""
    SECOND = 2**30 + 2**29
    """A second pass of a call that begins with an image."""


def image_keys(seeds: UInt32[Array, "b 3"]) -> Key[Array, "b"]:
    """The random key of each image.

    The generator is Threefry, whatever JAX is configured to use: for a batch of keys, JAX's other generators use the first only.

    Args:
        seeds: The low and the high half of each image's seed (`jax.random.key` alone reads the low one), and the number of an
            independent stream of this seed, `[b, 3]`.
    """

    def image_key(low, high, stream):
        key = jax.random.key(low, impl="threefry2x32")
        return jax.random.fold_in(jnp.where(high > 0, jax.random.fold_in(key, high), key), stream)

    return jax.vmap(image_key)(*seeds.T)


def band_noise(
    keys: Key[Array, "b"], number: Array | int, first: Array | int, shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Standard normal noise of some rows of images. Each row has its own key, so values do not depend on the bands.

    Args:
        keys: The random key of each image, `[b]`.
        number: Which noise of the image (`Stream`).
        first: The index in the image of the first row.
        shape: Rows, columns and channels.

    Returns:
        Noise, `[b, h, w, c]`, float32.
    """
    rows, width, channels = shape

    def row(key, index):
        return jax.random.normal(jax.random.fold_in(key, index), (width, channels), jnp.float32)

    def image(key):
        return jax.vmap(lambda index: row(jax.random.fold_in(key, number), index))(first + jnp.arange(rows))

    return jax.vmap(image)(keys)


def draw_latents(
    layout: Layout, channels: int, keys: Key[Array, "images"], stream: Stream = Stream.TEXT
) -> Float[Array, "b h w c"]:
    """The noise that a call begins with, `[b, h, w, channels]` with padding. Each device draws its own band.

    Args:
        layout: Layout of the call.
        channels: Of the latents.
        keys: The images' random keys.
        stream: The stream of the call's noise.
    """
    rows, columns = layout.bands.rows_per_device, layout.padded_shape[1]

    def band(keys):
        return band_noise(keys, int(stream), first_row(rows, layout.rows), (rows, columns, channels))

    return jax.shard_map(band, mesh=layout.mesh, in_specs=P(DATA), out_specs=layout.latents)(keys)
