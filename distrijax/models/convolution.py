"""Convolutions of rows that are all there, each computed in the way that suits its platform and size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

LARGE_KERNEL = 2**20
"""Elements of a kernel from which on it is worth a product on CPUs that there are few pixels."""

WINOGRAD_CHANNELS, WINOGRAD_PIXELS, WINOGRAD_WORK = 32, 128, 2**27
"""What is worth Winograd's sums on CPUs: so many channels, at most so many pixels for each of them, so many multiplications.

Four times the input is held, which costs more the fewer channels share in it; and a small convolution does not bring back
the tenth of a second that its sums take to compile.
"""

TPU_SUMS = 3 * 2**22
"""Elements of a result up to which TPUs have room for its sums in the chip's own memory."""


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "y x i o"], stride: int, sides: tuple[int, int]
) -> Float[Array, "b H W o"]:
    """Convolution; sides: the columns of zeros to the left and to the right.

    XLA's own on GPUs. On CPUs it takes up to three times as long as products of matrices that give the same. On TPUs it first
    makes a batch of a small batch's columns, and by libtpu's own estimate these copies alone take longer than the products.
    """
    ways = {"cpu": _way_of_cpus(x, kernel, stride, sides), "tpu": _way_of_tpus(x, kernel, stride, sides)}
    plain = functools.partial(_plain, stride=stride, sides=sides)
    return lax.platform_dependent(x, kernel, **{name: way or plain for name, way in ways.items()}, default=plain)


def _way_of_tpus(x: Array, kernel: Array, stride: int, sides: tuple[int, int]) -> Callable | None:
    """Products in the place of XLA's convolution, or None."""
    if x.size // stride**2 * kernel.shape[-1] > TPU_SUMS * x.shape[-1]:
        return None
    return functools.partial(_shifted, stride=stride, sides=sides)


def _way_of_cpus(x: Array, kernel: Array, stride: int, sides: tuple[int, int]) -> Callable | None:
    """Products in the place of XLA's convolution, or None."""
    height, width, *channels = kernel.shape
    rows, columns = x.shape[1] - height + 1, x.shape[2] + sum(sides) - width + 1
    if kernel.size > LARGE_KERNEL and 4 * math.prod(x.shape[:3]) <= stride**2 * channels[1]:
        return functools.partial(_product, stride=stride, sides=sides)
    possible = (height, width, stride) == (3, 3, 1) and rows % 2 == columns % 2 == 0 and x.dtype == jnp.float32
    pixels, fewest = x.shape[0] * rows * columns, min(channels)
    few_for_channels = fewest >= WINOGRAD_CHANNELS and pixels <= WINOGRAD_PIXELS * fewest
    if possible and few_for_channels and pixels * kernel.size >= WINOGRAD_WORK:
        return functools.partial(_winograd, sides=sides)
    return None


def _plain(x: Array, kernel: Array, stride: int, sides: tuple[int, int]) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((0, 0), sides), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _product(x: Array, kernel: Array, stride: int, sides: tuple[int, int]) -> Array:
    """All that a kernel sees at a pixel side by side, times the kernel."""
    return jnp.concatenate(list(_seen(x, kernel, stride, sides)), -1) @ kernel.reshape(-1, kernel.shape[-1])


@functools.partial(jax.jit, static_argnames=("stride", "sides"))
def _shifted(x: Array, kernel: Array, stride: int, sides: tuple[int, int]) -> Array:
    """For each place in the kernel, the pixels that it sees times its part of the kernel; summed in float32.

    jit: this is traced once for convolutions of the same shapes, on other platforms in vain.
    """
    products = (
        jnp.matmul(pixels, kernel[place], preferred_element_type=jnp.float32)
        for place, pixels in zip(np.ndindex(kernel.shape[:2]), _seen(x, kernel, stride, sides), strict=True)
    )
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _seen(x: Array, kernel: Array, stride: int, sides: tuple[int, int]) -> Iterator[Array]:
    """For each place in a kernel, row by row, the pixels that it sees."""
    x = jnp.pad(x, ((0, 0), (0, 0), sides, (0, 0)))
    down, right = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    return (x[:, i : i + down : stride, j : j + right : stride] for i, j in np.ndindex(kernel.shape[:2]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _winograd(x: Array, kernel: Array, sides: tuple[int, int]) -> Array:
    """F(2x2, 3x3) of Lavin and Gray, "Fast algorithms for convolutional neural networks" (2015): 16 products for 36.

    Of every 4 x 4 pixels, two apart, the 2 x 2 in their midst.
    """
    x = jnp.pad(x, ((0, 0), (0, 0), sides, (0, 0)))
    batch, rows, columns = x.shape[0], x.shape[1] // 2 - 1, x.shape[2] // 2 - 1
    pixels = [[x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for j in range(4)] for i in range(4)]
    seen = _down_and_across(lambda a, b, c, d: (a - c, b + c, c - b, b - d), pixels)
    weights = _down_and_across(lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, c), kernel)
    products = [[left @ right for left, right in zip(*both, strict=True)] for both in zip(seen, weights, strict=True)]
    out = _down_and_across(lambda a, b, c, d: (a + b + c, b - c - d), products)
    out = jnp.stack([jnp.stack(row, 3) for row in out], 2)
    return out.reshape(batch, 2 * rows, 2 * columns, -1)


@_winograd.defjvp
def _derivative(sides: tuple[int, int], primals, tangents) -> tuple[Array, Array]:
    """XLA's convolution has the faster derivative."""
    return _winograd(*primals, sides), jax.jvp(functools.partial(_plain, stride=1, sides=sides), primals, tangents)[1]


def _down_and_across(combine: Callable, grid) -> list[tuple[Array, ...]]:
    """The rows of a grid of arrays, after `combine` has had its columns, and then its rows."""
    columns = [combine(*column) for column in zip(*grid, strict=True)]
    return [combine(*row) for row in zip(*columns, strict=True)]
