"""Convolution of rows that are all present, by the algorithm that is fastest for the platform and the size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from distrijax.parallel.platform import platform_dependent

LARGE_KERNEL = 2**20
"""Elements of a kernel above which im2col is faster on CPUs, if there are few pixels."""

WINOGRAD_CHANNELS, WINOGRAD_PIXELS, WINOGRAD_WORK = 32, 128, 2**27
"""Where Winograd's algorithm is faster on CPUs: least channels, most pixels per channel, least multiplications.

It holds four times the input, which costs more the fewer channels there are; and a small convolution does not earn back
the tenth of a second that the transforms take to compile.
"""

TPU_ACCUMULATORS = 3 * 2**22
"""Elements of a result up to which its float32 sums fit into a TPU's on-chip memory."""


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "y x i o"], stride: int, padding: tuple[int, int]
) -> Float[Array, "b H W o"]:
    """Convolution, without padding above and below.

    GPUs take XLA's own. On CPUs that takes up to three times as long as equivalent matmuls. On TPUs XLA turns columns of a
    small batch into a larger batch first, and by libtpu's estimate these copies alone take longer than matmuls.

    Args:
        x: The input.
        kernel: The kernel, HWIO.
        stride: Of rows and of columns.
        padding: Columns of zeros to the left and to the right.
    """
    plain = functools.partial(_plain, stride=stride, padding=padding)
    cpu, tpu = _cpu_algorithm(x, kernel, stride, padding), _tpu_algorithm(x, kernel, stride, padding)
    return platform_dependent(x, kernel, cpu=cpu or plain, tpu=tpu or plain, default=plain)


def _tpu_algorithm(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Callable | None:
    """What is faster on TPUs than XLA's convolution, or None."""
    if x.size // stride**2 * kernel.shape[-1] > TPU_ACCUMULATORS * x.shape[-1]:
        return None
    return functools.partial(_shifted_matmuls, stride=stride, padding=padding)


def _cpu_algorithm(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Callable | None:
    """What is faster on CPUs than XLA's convolution, or None."""
    height, width, *channels = kernel.shape
    rows, columns = x.shape[1] - height + 1, x.shape[2] + sum(padding) - width + 1
    if kernel.size > LARGE_KERNEL and 4 * math.prod(x.shape[:3]) <= stride**2 * channels[1]:
        return functools.partial(_im2col, stride=stride, padding=padding)
    possible = (height, width, stride) == (3, 3, 1) and rows % 2 == columns % 2 == 0 and x.dtype == jnp.float32
    pixels, fewest = x.shape[0] * rows * columns, min(channels)
    few_per_channel = fewest >= WINOGRAD_CHANNELS and pixels <= WINOGRAD_PIXELS * fewest
    if possible and few_per_channel and pixels * kernel.size >= WINOGRAD_WORK:
        return functools.partial(_winograd, padding=padding)
    return None


def _plain(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((0, 0), padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _im2col(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """One matmul: for each output pixel all input pixels that it reads, concatenated, times the kernel."""
    return jnp.concatenate(list(_shifted_inputs(x, kernel, stride, padding)), -1) @ kernel.reshape(-1, kernel.shape[-1])


@functools.partial(jax.jit, static_argnames=("stride", "padding"))
def _shifted_matmuls(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """One matmul for each position in the kernel, with the input shifted to it; summed in float32.

    jit lets convolutions of the same shapes share one trace.
    """
    products = (
        jnp.matmul(pixels, kernel[position], preferred_element_type=jnp.float32)
        for position, pixels in zip(
            np.ndindex(kernel.shape[:2]), _shifted_inputs(x, kernel, stride, padding), strict=True
        )
    )
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _shifted_inputs(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Iterator[Array]:
    """For each position in a kernel, row by row, the pixels that it multiplies, [b, H, W, i]."""
    x = jnp.pad(x, ((0, 0), (0, 0), padding, (0, 0)))
    down, right = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    return (x[:, i : i + down : stride, j : j + right : stride] for i, j in np.ndindex(kernel.shape[:2]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _winograd(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    """Winograd's F(2x2, 3x3): 16 multiplications instead of 36 for 2 x 2 output pixels, from 4 x 4 input pixels.

    References:
        Lavin and Gray, "Fast algorithms for convolutional neural networks" (2015), arXiv 1509.09308.
    """
    x = jnp.pad(x, ((0, 0), (0, 0), padding, (0, 0)))
    batch, rows, columns = x.shape[0], x.shape[1] // 2 - 1, x.shape[2] // 2 - 1
    pixels = [[x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for j in range(4)] for i in range(4)]
    tiles = _transform(lambda a, b, c, d: (a - c, b + c, c - b, b - d), pixels)
    weights = _transform(lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, c), kernel)
    products = [[left @ right for left, right in zip(*both, strict=True)] for both in zip(tiles, weights, strict=True)]
    out = _transform(lambda a, b, c, d: (a + b + c, b - c - d), products)
    out = jnp.stack([jnp.stack(row, 3) for row in out], 2)
    return out.reshape(batch, 2 * rows, 2 * columns, -1)


@_winograd.defjvp
def _derivative(padding: tuple[int, int], primals, tangents) -> tuple[Array, Array]:
    """The derivative of XLA's convolution, which is faster."""
    plain = functools.partial(_plain, stride=1, padding=padding)
    return _winograd(*primals, padding), jax.jvp(plain, primals, tangents)[1]


def _transform(combine: Callable, grid) -> list[tuple[Array, ...]]:
    """Applies `combine` to each column of a grid of arrays, and then to each row of the result."""
    columns = [combine(*column) for column in zip(*grid, strict=True)]
    return [combine(*row) for row in zip(*columns, strict=True)]
