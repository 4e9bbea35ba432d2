"""Keys and values in 8 or 4 bits: where the levels are, which bytes travel, and what is exact."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from distrijax import Compression
from distrijax.parallel.compression import dequantize, quantize

EVERY = pytest.mark.parametrize(("compression", "levels"), [("int8", 256), ("int4", 16)])
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


def there_and_back(x, compression: str) -> np.ndarray:
    kind = Compression(compression)
    return np.asarray(dequantize(*quantize(jnp.asarray(x), kind), kind))


@EVERY
@DTYPES
def test_no_value_is_off_by_more_than_half_a_level_of_its_channel(compression, levels, dtype):
    """Channels of very different sizes, one of them far from zero, in two images."""
    draw = np.random.default_rng(0).normal(size=(2, 96, 4))
    x = jnp.asarray(draw * [100.0, 1.0, 1e-3, 0.1] + [0.0, 0.0, 0.0, 5.0], dtype)
    got, wanted = np.float64(there_and_back(x, compression)), np.float64(x)
    half = np.ptp(wanted, axis=1, keepdims=True) / (levels - 1) / 2
    own_rounding = float(jnp.finfo(dtype).eps) * np.abs(wanted)
    assert (np.abs(got - wanted) <= 1.001 * half + own_rounding).all()
    assert (np.abs(got - wanted).max(1) > 0.8 * half[:, 0]).any()  # there are no more levels than that
    ends = [(values.min(1), values.max(1)) for values in (got, wanted)]
    np.testing.assert_allclose(*ends, rtol=4 * float(jnp.finfo(dtype).eps))


@EVERY
def test_values_on_the_levels_are_exact_and_so_is_a_channel_of_one_value(compression, levels):
    x = np.random.default_rng(1).permuted(np.arange(levels, dtype=np.float32)[:, None].repeat(6, 1), axis=0) / 4 - 17
    x[:, 2], x[:, 3] = 0.1, 0
    np.testing.assert_array_equal(there_and_back(x[None], compression), x[None])


def test_four_bits_are_keys_in_the_low_and_values_in_the_high_half_of_a_byte():
    x = np.random.default_rng(2).permuted(np.arange(16)[:, None].repeat(6, 1), axis=0)
    numbers, ends = quantize(jnp.asarray(x[None], jnp.bfloat16), Compression.INT4)
    assert (numbers.dtype, ends.dtype) == (jnp.uint8, jnp.bfloat16)
    np.testing.assert_array_equal(numbers[0], x[:, :3] + 16 * x[:, 3:])
    np.testing.assert_array_equal(ends[0].astype(jnp.float32), [[0] * 6, [15] * 6])


@EVERY
def test_what_was_rounded_once_stays_as_it_is(compression, levels):
    x = np.random.default_rng(3).normal(size=(1, 50, 4)).astype(np.float32)
    once = there_and_back(x, compression)
    np.testing.assert_allclose(there_and_back(once, compression), once, rtol=1e-5, atol=1e-6)
    assert max(len(np.unique(once[0, :, channel])) for channel in range(4)) <= levels
