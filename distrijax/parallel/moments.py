"""Mean and variance for GroupNorm: of a band of rows, and of the whole image from those of its bands."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def split_moments(moments: Array) -> tuple[Array, Array]:
    return moments[..., 0], moments[..., 1]


def local_moments(
    x: Float[Array, "b h w c"], size: int, inside: Bool[Array, "h"] | None = None
) -> Float[Array, "b g 2"]:
    """Mean and variance of groups of `size` channels over a band's rows, or those of them that are `inside` the image.

    From each channel's sum, and that of the squares of its distances from its first pixel: both can be taken in one pass, and
    nothing large cancels. Pixels first and channels last, along contiguous memory.
    """
    x = x.astype(jnp.float32)
    first, pixels, counted = x[:, 0, 0], float(x.shape[1] * x.shape[2]), None
    if inside is not None:
        first, counted = jnp.where(inside[0], first, 0.0), inside[None, :, None, None]
        pixels = jnp.maximum(jnp.sum(inside), 1).astype(jnp.float32) * x.shape[2]
    sums = (jnp.sum(each, (1, 2), where=counted) for each in (x, jnp.square(x - first[:, None, None])))
    mean, mean_square = (each / pixels for each in sums)

    # of the group's channels in the same way, from the mean of the first of them
    means = mean.reshape(x.shape[0], -1, size)
    variances = (mean_square - jnp.square(mean - first)).reshape(means.shape)
    far = means - means[..., :1]
    mean_far, mean_square = jnp.mean(far, -1), jnp.mean(variances + jnp.square(far), -1)
    return jnp.stack([means[..., 0] + mean_far, jnp.maximum(mean_square - jnp.square(mean_far), 0.0)], -1)


def pool_moments(moments: Float[Array, "n b g 2"], shares: Float[np.ndarray, "n"]) -> Float[Array, "b g 2"]:
    """The whole image's mean and variance from those of patches and their shares in it (law of total variance)."""
    means, variances = split_moments(moments)
    shares = shares[:, None, None]
    mean = jnp.sum(shares * means, 0)
    return jnp.stack([mean, jnp.sum(shares * (variances + jnp.square(means - mean[None])), 0)], -1)
