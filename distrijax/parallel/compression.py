"""Compression of keys and values: linear quantization to 8 or 4 bits, for each channel of a patch.

    [b, t, c]  --quantize-->  indices of quantization steps, in bytes  --all-gather, dequantize-->  [b, n, t, c]
                              minimum and maximum of each channel

The quantization steps of a channel are evenly spaced from its minimum in the patch to its maximum. A symmetric range would
waste half of them on a channel of keys that is far from zero. The error is at most half a step.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from distrijax.config import Compression

BITS = {Compression.INT8: 8, Compression.INT4: 4}
"""Bits of one value. With 4 bits a channel of the first half (keys) and one of the second (values) share a byte."""


def quantize(
    x: Float[Array, "b t c"], compression: Compression
) -> tuple[UInt8[Array, "b t packed"], Float[Array, "b 2 c"]]:
    """Quantizes each channel linearly between its minimum and its maximum.

    Args:
        x: Values `[b, t, c]`; with int4, `c` is even.
        compression: How many bits a value gets.

    Returns:
        The index of the nearest quantization step of each value, packed into bytes, `[b, t, c]` or, with int4,
        `[b, t, c / 2]`; and each channel's minimum and maximum, `[b, 2, c]`, in the dtype of `x`.
    """
    channel_range = jnp.stack([jnp.min(x, 1), jnp.max(x, 1)], 1)
    minimum, step = _quantization_steps(channel_range, compression)
    indices = jnp.round((x.astype(jnp.float32) - minimum) / jnp.where(step > 0, step, 1)).astype(jnp.uint8)
    if compression is Compression.INT4:
        low, high = jnp.split(indices, 2, axis=-1)
        indices = low | high << 4
    return indices, channel_range


def dequantize(
    indices: UInt8[Array, "*n t packed"], channel_range: Float[Array, "*n 2 c"], compression: Compression
) -> Float[Array, "*n t c"]:
    """The inverse of `quantize`, up to rounding, in the dtype of `channel_range`.

    Args:
        indices: Of the quantization steps, as from `quantize`.
        channel_range: Per-channel minimum and maximum.
        compression: The compression.
    """
    if compression is Compression.INT4:
        indices = jnp.concatenate([indices & 15, indices >> 4], -1)
    minimum, step = _quantization_steps(channel_range, compression)
    return (minimum + indices.astype(jnp.float32) * step).astype(channel_range.dtype)


def _quantization_steps(
    channel_range: Float[Array, "*n 2 c"], compression: Compression
) -> tuple[Float[Array, "*n 1 c"], Float[Array, "*n 1 c"]]:
    """Each channel's minimum, and the distance between its quantization steps, in float32."""
    minimum, maximum = jnp.split(channel_range.astype(jnp.float32), 2, axis=-2)
    return minimum, (maximum - minimum) / (2 ** BITS[compression] - 1)
