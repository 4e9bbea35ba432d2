"""Keys and values in fewer bits, for the way from device to device.

    tokens [b t c]  --encode-->  levels, packed into bytes     --sent, decode--->  tokens [b n t c]
                                 each channel's two ends

The levels of a channel lie equally far apart from its smallest value in the patch to its largest, so that a channel of keys
far from zero loses nothing to the emptiness on zero's other side. Nothing is off by more than half a level.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from distrijax.config import Compression

BITS = {Compression.INT8: 8, Compression.INT4: 4}
"""Of one value. In four bits the first half of the channels (keys) and the second (values) share their bytes."""


def encode(
    x: Float[Array, "b t c"], compression: Compression
) -> tuple[UInt8[Array, "b t packed"], Float[Array, "b 2 c"]]:
    """Numbers of levels, and the smallest and the largest value of each channel; with int4 channels must be even in number."""
    ends = jnp.stack([jnp.min(x, 1), jnp.max(x, 1)], 1)
    lowest, step = _levels(ends, compression)
    numbers = jnp.round((x.astype(jnp.float32) - lowest) / jnp.where(step > 0, step, 1)).astype(jnp.uint8)
    if compression is Compression.INT4:
        low, high = jnp.split(numbers, 2, axis=-1)
        numbers = low | high << 4
    return numbers, ends


def decode(
    numbers: UInt8[Array, "*n t packed"], ends: Float[Array, "*n 2 c"], compression: Compression
) -> Float[Array, "*n t c"]:
    """The values nearest to what was encoded, in the dtype of `ends`."""
    if compression is Compression.INT4:
        numbers = jnp.concatenate([numbers & 15, numbers >> 4], -1)
    lowest, step = _levels(ends, compression)
    return (lowest + numbers.astype(jnp.float32) * step).astype(ends.dtype)


def _levels(
    ends: Float[Array, "*n 2 c"], compression: Compression
) -> tuple[Float[Array, "*n 1 c"], Float[Array, "*n 1 c"]]:
    """The lowest level, and the way from one to the next, in float32."""
    lowest, highest = jnp.split(ends.astype(jnp.float32), 2, axis=-2)
    return lowest, (highest - lowest) / (2 ** BITS[compression] - 1)
