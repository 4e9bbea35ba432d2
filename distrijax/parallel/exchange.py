"""What a layer may ask about the rest of the image: the exchange protocol, and the strategies that answer exactly.

The rows of an image are divided into bands of equal height ("patches"), one for each device along the `patch` axis. Every
device runs the whole model on its own patch `x`. Three kinds of layers need something of the other patches, and ask an
exchange object for it (`name` is the layer's path in the model):

                  +------------+
    patch i - 1   |    ...     |
                  | last rows  |--+
                  +------------+  |   halo(name, x, above, below)   x between its neighbours' rows, for a 3x3 convolution
    patch i       |            |<-+
                  |     x      |      kv(name, kv)                  keys and values of all patches, for self-attention
                  |            |<-+
                  +------------+  |   moments(name, x, size)        mean and variance over all patches, for GroupNorm
    patch i + 1   | first rows |--+
                  |    ...     |
                  +------------+

Each strategy is a class that answers these questions. Layers know neither mesh axes nor strategies:

    WholeImage      The device has all rows, so nothing is exchanged: there are zeros beyond the image's border.
    Synchronous     The other patches' values are those of this step. Exact, but the layer waits for them.
    Displaced       The other patches' values are those of the previous step, so their transfer overlaps with compute; the own
                    values are those of this step. It and its variants, one for each sync mode, are in `displaced.py`.
    TensorParallel  The device has all rows, but a part of the channels. Layers whose channels are divided ask three more
                    questions, `ChannelParallel`: channels, whole_sum and context.

An exchange serves one call of a model. While it answers, it keeps what this patch publishes for the next step:

    exchange = Synchronous()                  a synchronous step needs no stale state ...
    unet(sample, ..., exchange)
    stale = exchange.finish()                 ... and creates it: what this patch published (`Stale`)

    exchange = Displaced(stale)               a displaced step reads the state of the step before ...
    unet(sample, ..., exchange)
    stale = exchange.finish()                 ... and replaces it

The collectives that carry the answers are in `collectives.py`. A new strategy is a new class; no line of a model changes.

If the image's rows do not fill the bands (`Bands`), the last rows are padding. They are zeros to a convolution, they are no
keys to an attention, and moments do not count them. What a layer computes there is never read.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import ClassVar, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from distrijax.config import Compression
from distrijax.parallel.bands import Bands
from distrijax.parallel.collectives import (
    FIRST,
    LAST,
    Axis,
    KeysValues,
    device_sum,
    first_row,
    gather,
    gather_channels,
    gather_rows,
    split_kv,
    with_neighbours,
)
from distrijax.parallel.compression import quantize
from distrijax.parallel.mesh import PATCH
from distrijax.parallel.moments import local_moments, pool_moments

HALO, KV, MOMENTS = "halo", "kv", "moments"
"""Kinds of values that patches publish."""

CHANNEL_RANGE = "kv.channel_range"
"""The kind of compressed channels' minima and maxima."""

Stale = dict[tuple[str, str], Array]
"""What one patch published at a step, by kind and path of the layer. Leaves are local shards, in the model's dtype if not noted:

kind            path                 value
HALO            name + LAST          last rows, for the patch below           [b, rows, w, c]
                name + FIRST         first rows, for the patch above          [b, rows, w, c]
KV              name                 keys and values, side by side            [b, h * w, 2 * c]
                or, if compressed:   their quantization steps, in bytes       [b, h * w, packed], uint8
CHANNEL_RANGE   name                 each channel's minimum and maximum       [b, 2, 2 * c]
MOMENTS         name                 mean and variance of each group          [b, groups, 2], float32
ema(kind)       as of the kind       the exponential moving average, in the shape of the uncompressed value

A strategy keeps the kinds that its next step reads. Rows that no neighbour asks for are not kept. With extrapolation each
published value is a prediction, and the exponential moving average that it was made from is kept beside it.
"""


def ema(kind: str) -> str:
    """The kind of the exponential moving averages of values of a kind.

    Args:
        kind: A kind of stale values.
    """
    return f"{kind}.ema"


@dataclasses.dataclass(frozen=True)
class Publishing:
    """What a step publishes for the next one.

    Attributes:
        kinds: `HALO`, `KV`, `MOMENTS`, or some of them.
        extrapolate: Whether predictions of the next step's values are published instead of this step's values.
        compress: How keys and values are compressed, if at all.
    """

    kinds: frozenset[str] = frozenset({HALO, KV, MOMENTS})
    extrapolate: bool = False
    compress: Compression | None = None


class ChannelParallel(Protocol):
    """What layers ask if each device has a part of a layer's weights, and so of its channels.

    Tensor parallelism divides many layers so. The projections of the prompt's keys and values are divided in every
    strategy, because they are computed once per call.
    """

    def channels(self, x: Float[Array, "... c"], count: int) -> Float[Array, "... {count}"]:
        """Returns this device's `count` channels of `x`, or `x` if it has no others.

        Args:
            x: An array whose last axis is channels.
            count: Number of channels of a device's part.
        """

    def whole_sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the sum of all devices' partial results.

        Args:
            x: This device's partial result.
        """

    def context(self, part: Float[Array, "... c"], channels: int) -> Float[Array, "... C"]:
        """Returns the prompt's keys, or values, that this device's cross-attention reads.

        Args:
            part: The channels that this device computed.
            channels: How many there are on all devices together.
        """


class Exchange(ChannelParallel, Protocol):
    """What layers ask about the rest of the image. The name of a layer is its path; each may ask once in a call."""

    def halo(self, name: str, x: Float[Array, "b h w c"], above: int, below: int) -> Float[Array, "b H w c"]:
        """Returns `x` between rows of its neighbours, zeros at the image's border.

        Args:
            name: The layer's path in the model.
            x: This patch.
            above: How many rows of the patch above.
            below: How many rows of the patch below.
        """

    def kv(self, name: str, kv: Float[Array, "b h w c2"]) -> KeysValues:
        """Returns keys and values of the whole image, `[b, T, c]` each.

        Args:
            name: The layer's path.
            kv: This patch's keys and values side by side, [b, t, 2 c].
        """

    def moments(self, name: str, x: Float[Array, "b h w c"], size: int) -> Float[Array, "b g 2"]:
        """Returns mean and variance over the whole image of each group of channels, in float32.

        Args:
            name: The layer's path.
            x: This patch, [b, h, w, c], float32.
            size: Channels of a group.
        """

    def resample(
        self, name: str, x: Float[Array, "b h w c"], weights: Float[np.ndarray, "H R"], bands: Bands
    ) -> Float[Array, "b q w c"]:
        """Returns this patch's rows of a map whose every row is a weighted sum of the image's rows: a map of another height.

        Args:
            name: A name, as that of a layer.
            x: This patch.
            weights: For each row of the new map the weight of each of the image's rows at the level of `x`.
            bands: How the new map is divided among the patches.
        """

    def at(self, bands: Bands) -> Exchange:
        """Returns this exchange for layers on a map of another height; what either publishes, `finish` returns.

        Args:
            bands: How that map is divided.
        """

    def exact(self) -> Exchange:
        """Returns an exchange that answers exactly, for a layer whose values must not be stale: the UNet's first."""

    def finish(self) -> Stale:
        """Returns what this patch published. To be called once, after the model."""


class WholeImage:
    """The exchange of a device that has the whole image.

    In naive_patch mode every patch is treated as an image of its own, so it is the exchange of a patch there.
    """

    def halo(self, name, x, above, below):
        return jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))

    def kv(self, name, kv):
        return split_kv(flatten_pixels(kv))

    def moments(self, name, x, size):
        return local_moments(x, size)

    def resample(self, name, x, weights, bands):
        return weighted_rows(x, weights)

    def at(self, bands):
        return self

    def channels(self, x, count):
        return x

    def whole_sum(self, x):
        return x

    def context(self, part, channels):
        return part

    def exact(self) -> Exchange:
        return self

    def finish(self) -> Stale:
        return {}


class TensorParallel(WholeImage):
    """Tensor parallelism: every device has the whole image and a part of the inner channels.

    Args:
        axis: The mesh axis along which `distrijax.weights.sharding` divides the weights.

    References:
        Megatron-LM, arXiv 1909.08053.
    """

    def __init__(self, axis: Axis = PATCH):
        self.axis = axis

    def channels(self, x, count):
        if x.shape[-1] == count:  # the layer before this one computed this device's channels only
            return x
        whole = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lax.axis_size(self.axis) * count - x.shape[-1])])
        return lax.dynamic_slice_in_dim(whole, lax.axis_index(self.axis) * count, count, axis=-1)

    def whole_sum(self, x):
        return device_sum(x, self.axis)


class Synchronous(WholeImage):
    """Blocking exchange of this step's values: exact for any number of patches.

    Args:
        axis: The mesh axis, or axes, along which the rows are sharded.
        bands: How the rows are divided, if they do not fill the bands; None if they do.
        publishing: What the next step will read; None publishes everything.
    """

    SEPARATE_PERMUTES: ClassVar[bool] = (
        False  # whether XLA must not combine its permutes with others (`with_neighbours`)
    )

    def __init__(self, axis: Axis = PATCH, bands: Bands | None = None, publishing: Publishing | None = None):
        self.axis, self.bands = axis, bands
        self.publishing = publishing or Publishing()
        self.fresh: Stale = {}
        self._used: set[tuple[str, str]] = set()

    def halo(self, name, x, above, below):
        x = self._without_padding(x)
        return with_neighbours(
            x, self._publish_edges(name, x, above, below), self.axis, separate=self.SEPARATE_PERMUTES
        )

    def kv(self, name, kv):
        own = self._publish(KV, name, self._local_kv(kv))
        return split_kv(self._image_kv(gather_rows(own, self.axis), kv))

    def moments(self, name, x, size):
        own = self._publish(MOMENTS, name, self._band_moments(x, size))
        return pool_moments(gather(own, self.axis), self._band_shares(x))

    def resample(self, name, x, weights, bands):
        parts, above, below = band_weights(weights, lax.axis_size(self.axis), x.shape[1], bands.rows_per_device)
        if max(above, below) <= x.shape[1]:
            rows = self.halo(name, x, above, below)
        else:  # the bands lie too far apart
            rows = gather_rows(flatten_pixels(self._without_padding(x)), self.axis).reshape(
                x.shape[0], -1, *x.shape[2:]
            )
        return weighted_rows(rows, jnp.asarray(parts)[lax.axis_index(self.axis)])

    def at(self, bands):
        other = copy.copy(self)
        other.bands = bands
        return other

    def context(self, part, channels):
        return gather_channels(part)[..., :channels]

    def exact(self) -> Exchange:
        return Synchronous(self.axis, self.bands)

    def finish(self) -> Stale:
        return self.fresh

    def _publish(self, kind: str, name: str, value: Array) -> Array:
        """Returns `value`, and keeps what the next step will read of it."""
        if (kind, name) in self._used:
            raise KeyError(f"the layer name {name!r} was used twice in one call; every exchanging layer needs its own")
        self._used.add((kind, name))
        if kind in self.publishing.kinds:
            published = value
            if self.publishing.extrapolate:
                published, self.fresh[ema(kind), name] = self._extrapolate(kind, name, value)
            if self.publishing.compress and kind == KV:
                published, self.fresh[CHANNEL_RANGE, name] = quantize(published, self.publishing.compress)
            self.fresh[kind, name] = published
        return value

    def _publish_edges(self, name: str, x: Float[Array, "b h w c"], above: int, below: int) -> dict[str, Array]:
        """Publishes and returns the rows that the neighbours need: `LAST` for the patch below, `FIRST` for the one above."""
        edges = {LAST: x[:, x.shape[1] - above :], FIRST: x[:, :below]}
        return {end: self._publish(HALO, name + end, rows) for end, rows in edges.items() if rows.shape[1]}

    def _extrapolate(self, kind: str, name: str, value: Array) -> tuple[Array, Array]:
        """A prediction of the next step's value, and the exponential moving average to continue from. Both begin as the value."""
        return value, value

    def _rows(self, x: Float[Array, "b h w c"]) -> tuple[int, int]:
        """How many rows all bands have together, and how many the image has, at the level of `x`."""
        rows = lax.axis_size(self.axis) * x.shape[1]
        return rows, rows if self.bands is None else self.bands.image_rows(x.shape[1])

    def _in_image(self, x: Float[Array, "b h w c"]) -> Bool[Array, "h"] | None:
        """Which rows of this band belong to the image; None if no band has padding."""
        rows, image = self._rows(x)
        return None if rows == image else first_row(x.shape[1], self.axis) + jnp.arange(x.shape[1]) < image

    def _without_padding(
        self, x: Float[Array, "b h w c"], filler: Float[Array, "b 1 1 c"] | None = None
    ) -> Float[Array, "b h w c"]:
        """`x` with its padding replaced by zeros, or by the pixel `filler` of each image."""
        inside = self._in_image(x)
        if inside is None:
            return x
        return jnp.where(inside[None, :, None, None], x, jnp.zeros((), x.dtype) if filler is None else filler)

    def _local_kv(self, kv: Float[Array, "b h w c2"]) -> Float[Array, "b t c2"]:
        """This patch's keys and values, flat.

        If they are compressed, padding repeats the first pixel and so does not widen a channel's range.
        """
        return flatten_pixels(self._without_padding(kv, kv[:, :1, :1]) if self.publishing.compress else kv)

    def _image_kv(self, everyone: Float[Array, "b t c"], kv: Float[Array, "b h w c2"]) -> Float[Array, "b T c"]:
        """The image's keys or values: all patches' without those of the padding, which come last."""
        return everyone[:, : self._rows(kv)[1] * kv.shape[2]]

    def _band_moments(self, x: Float[Array, "b h w c"], size: int) -> Float[Array, "b g 2"]:
        return local_moments(x, size, self._in_image(x))

    def _band_shares(self, x: Float[Array, "b h w c"]) -> Float[np.ndarray, "n"]:
        """The share of the image's rows that each patch has."""
        patches, (_, image) = lax.axis_size(self.axis), self._rows(x)
        return np.clip(image - x.shape[1] * np.arange(patches), 0, x.shape[1]).astype(np.float32) / image


def flatten_pixels(x: Float[Array, "b ... c"]) -> Float[Array, "b t c"]:
    """Merges the spatial axes in raster order, to [b, h * w, c].

    Args:
        x: [b, h, w, c].
    """
    return x.reshape(x.shape[0], -1, x.shape[-1])


def weighted_rows(x: Float[Array, "b h w c"], weights: Float[Array | np.ndarray, "q h"]) -> Float[Array, "b q w c"]:
    """Weighted sums of rows, in the dtype of `x`.

    Args:
        x: The rows.
        weights: The weight of each row in each sum.
    """
    return jnp.einsum("qh,bhwc->bqwc", jnp.asarray(weights, x.dtype), x)


def band_weights(
    weights: Float[np.ndarray, "H R"], patches: int, rows: int, wanted: int
) -> tuple[Float[np.ndarray, "patches wanted window"], int, int]:
    """The part of `Exchange.resample`'s weights that each patch needs.

    Args:
        weights: Of the whole image, without padding.
        patches: Number of patches.
        rows: Rows of a patch, padding included.
        wanted: Rows of the new map's patch, padding included.

    Returns:
        The weights of each patch's rows, which are its own and some above and below them; how many of its upper and of its lower
        neighbour. Where a patch needs more than those have, the weights are of the rows of all patches.
    """
    padded = np.zeros((patches * wanted, patches * rows), np.float32)
    padded[: weights.shape[0], : weights.shape[1]] = weights
    bands = padded.reshape(patches, wanted, patches * rows)
    above = below = 0
    for patch, band in enumerate(bands):
        used = np.flatnonzero(band.any(0))
        if used.size:
            above = max(above, patch * rows - used[0])
            below = max(below, used[-1] + 1 - (patch + 1) * rows)
    above, below = int(above), int(below)
    if max(above, below) > rows:
        return bands, above, below
    spread = np.pad(bands, ((0, 0), (0, 0), (above, below)))
    windows = [spread[patch, :, patch * rows : (patch + 1) * rows + above + below] for patch in range(patches)]
    return np.stack(windows), above, below
