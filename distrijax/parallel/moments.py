"""Mean and variance for GroupNorm: of one patch, and of the whole image from those of its patches."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def split_moments(moments: Array) -> tuple[Array, Array]:
    """Mean and variance.

    Args:
        moments: `[..., 2]`.

    Returns:
        `[...]` each.
    """
    return moments[..., 0], moments[..., 1]


def local_moments(
    x: Float[Array, "b h w c"], size: int, inside: Bool[Array, "h"] | None = None
) -> Float[Array, "b g 2"]:
    """Mean and variance of each group of channels in a patch, in float32.

    Computed from each channel's sum and its sum of squared distances from the first pixel. Both need one pass, and no large
    numbers cancel. Pixels are summed first and channels last, along contiguous memory.

    Args:
        x: The patch, `[b, h, w, c]`.
        size: Channels per group.
        inside: Which rows belong to the image, `[h]`; the others are not counted. None counts all.

    Returns:
        Mean and variance, `[b, c / size, 2]`.
    """
    x = x.astype(jnp.float32)
    first, pixels, counted = x[:, 0, 0], float(x.shape[1] * x.shape[2]), None
    if inside is not None:
        first, counted = jnp.where(inside[0], first, 0.0), inside[None, :, None, None]
        pixels = jnp.maximum(jnp.sum(inside), 1).astype(jnp.float32) * x.shape[2]
    sums = (jnp.sum(each, (1, 2), where=counted) for each in (x, jnp.square(x - first[:, None, None])))
    mean, mean_square = (each / pixels for each in sums)

    # the group's channels in the same way, relative to the mean of the first
    means = mean.reshape(x.shape[0], -1, size)
    variances = (mean_square - jnp.square(mean - first)).reshape(means.shape)
    far = means - means[..., :1]
    mean_far, mean_square = jnp.mean(far, -1), jnp.mean(variances + jnp.square(far), -1)
    return jnp.stack([means[..., 0] + mean_far, jnp.maximum(mean_square - jnp.square(mean_far), 0.0)], -1)


def pool_moments(moments: Float[Array, "n b g 2"], shares: Float[np.ndarray, "n"]) -> Float[Array, "b g 2"]:
    """Mean and variance of the whole image (law of total variance).

    Args:
        moments: Mean and variance of each patch, `[n, b, g, 2]`.
        shares: The share of the image that each patch has, `[n]`; they sum to 1.

    Returns:
        Mean and variance, `[b, g, 2]`.
    """
    means, variances = split_moments(moments)
    shares = shares[:, None, None]
    mean = jnp.sum(shares * means, 0)
    return jnp.stack([mean, jnp.sum(shares * (variances + jnp.square(means - mean[None])), 0)], -1)
