"""Noise of images: random keys, and normal numbers row by row, which are the same on any mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, UInt32

from distrijax.parallel.collectives import first_row
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import DATA


def image_keys(seeds: UInt32[Array, "b 3"]) -> Key[Array, "b"]:
    """Random keys from the low and the high half of a seed (`jax.random.key` alone reads the low one), and one of its streams.

    Threefry's whatever JAX is configured to use: of many keys at once, its other generators heed the first alone.
    """

    def image_key(low, high, stream):
        key = jax.random.key(low, impl="threefry2x32")
        return jax.random.fold_in(jnp.where(high > 0, jax.random.fold_in(key, high), key), stream)

    return jax.vmap(image_key)(*seeds.T)


def band_noise(
    keys: Key[Array, "b"], number: Array | int, first: Array | int, shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Normal noise of some rows of images; each row has its own key, so the cut into bands changes no value.

    number: which noise of the image (0 is the starting one). first: global index of the first row. shape: [h, w, c].
    """
    rows, width, channels = shape

    def row(key, index):
        return jax.random.normal(jax.random.fold_in(key, index), (width, channels), jnp.float32)

    def image(key):
        return jax.vmap(lambda index: row(jax.random.fold_in(key, number), index))(first + jnp.arange(rows))

    return jax.vmap(image)(keys)


def draw_latents(layout: Layout, channels: int, keys: Key[Array, "images"]) -> Float[Array, "b h w c"]:
    """The starting noise of the whole canvas, drawn band by band on the devices."""
    rows, columns = layout.bands.rows_per_device, layout.padded_shape[1]

    def band(keys):
        return band_noise(keys, 0, first_row(rows, layout.rows), (rows, columns, channels))

    return jax.shard_map(band, mesh=layout.mesh, in_specs=P(DATA), out_specs=layout.latents)(keys)
