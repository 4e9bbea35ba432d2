"""What the devices tell each other: the only file with collectives.

The image is cut into bands of rows ("patches"), one for each device along the `patch` axis. Three kinds of layers need
something from other bands, and ask an exchange object for it:

      patch i-1  | ........... |          halo(name, x)          rows above and below, for 3x3 convolutions
                 | last row  ──┼──┐       kv(name, kv)           keys and values of the whole image, for self-attention
      patch i    | ┌─────────┐ |◄─┘       moments(name, x, size) mean and variance of the whole image, for GroupNorm
                 | │ x       │ |
                 | └─────────┘ |◄─┐
      patch i+1  | first row ──┼──┘       WholeImage     one device: nothing to ask for, zero padding at the edges
                 | ........... |          Synchronous    blocking and exact; what it publishes starts the stale state
                                          Displaced      what the others published at the previous step, own part fresh;
                                                         and its variants (`KINDS`)
                                          PartOfChannels no bands: every device has the whole image and a part of the
                                                         channels (tensor parallelism)

An exchange lives inside one traced call of a model. `finish()` returns what was published: a `Stale`, the next step's
stale state. A new strategy is a new class here, and no line of a model changes.

Bands are equally high. Where the image's rows do not fill them (`Bands`), the last rows are padding: zeros to a convolution,
no keys to an attention, not counted in moments. What a layer computes there is never read.
"""

from __future__ import annotations

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
from distrijax.parallel.compression import encode
from distrijax.parallel.mesh import PATCH
from distrijax.parallel.moments import local_moments, pool_moments

Stale = dict[str, Array]
"""What one patch published at a step, keyed by the path of the layer (local shards, batch first):

halo     [b, rows, w, c]           its last rows, for the patch below, under the path and `LAST`, and its first ones, for the
                                   patch above, under the path and `FIRST`, in the model's dtype; those that are asked for
tokens   [b, rows * w, 2 * c]      projected keys and values side by side, in the model's dtype; or, compressed, bytes, and
                                   [b, 2, 2 * c] each channel's ends, in the model's dtype, under the path and `ENDS`
moments  [b, groups, 2]            mean and variance for each group, float32

A strategy keeps those kinds that its next step reads from before. With extrapolation each of these is a prediction, and the
running mean that it was made from lies beside it, in the same shape, under the path and `MEAN`.
"""

HALO, KV, MOMENTS = "halo", "kv", "moments"

ENDS, MEAN = ".ends", ".mean"
"""What the names of the ends of compressed tokens' channels and of running means end in."""


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
    """What layers ask where devices hold parts of a layer's channels.

    channels: this device's `count` of the channels of `x`. whole_sum: the sum of all devices' partial results. context: keys
    or values of the prompt with all `channels`, of this device's part of them.
    """

    def channels(self, x: Float[Array, "... c"], count: int) -> Float[Array, "... {count}"]: ...

    def whole_sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]: ...

    def context(self, part: Float[Array, "... c"], channels: int) -> Float[Array, "... C"]: ...


class Exchange(ChannelParallel, Protocol):
    """What layers ask about the rest of the image, and `exact`, with which a model asks for values that must not be stale.

    halo: `x` with so many rows of its neighbours above and below. kv: takes the keys and values of a patch side by side, and
    returns those of the whole image, [b, T, c] each. moments: mean and variance over the whole image of groups of `size`
    channels. finish: what was published, at the end of the call.
    """

    def halo(self, name: str, x: Float[Array, "b h w c"], above: int, below: int) -> Float[Array, "b H w c"]: ...

    def kv(self, name: str, kv: Float[Array, "b h w c2"]) -> KeysValues: ...

    def moments(self, name: str, x: Float[Array, "b h w c"], size: int) -> Float[Array, "b g 2"]: ...

    def exact(self) -> Exchange: ...

    def finish(self) -> Stale: ...


class WholeImage:
    """The exchange of a device that holds the whole image, or takes its band for one: zero padding, nothing published."""

    def halo(self, name, x, above, below):
        return jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))

    def kv(self, name, kv):
        return split_kv(flatten_pixels(kv))

    def moments(self, name, x, size):
        return local_moments(x, size)

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
    """Tensor parallelism (arXiv 1909.08053): every device has the whole image and its part of the inner channels.

    axis: the mesh axis along which `distrijax.weights.sharding` has cut the weights.
    """

    def __init__(self, axis: Axis = PATCH):
        self.axis = axis

    def channels(self, x, count):
        if x.shape[-1] == count:  # a layer before this one was cut alike
            return x
        whole = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lax.axis_size(self.axis) * count - x.shape[-1])])
        return lax.dynamic_slice_in_dim(whole, lax.axis_index(self.axis) * count, count, axis=-1)

    def whole_sum(self, x):
        return device_sum(x, self.axis)


class Synchronous(WholeImage):
    """Blocking exchange of fresh values: exact for any number of patches.

    axis: the mesh axis, or axes, along which the rows are cut. bands: where the image's rows do not fill the bands; None
    where they do. publishing: what the step that follows will read; None publishes everything.
    """

    APART: ClassVar[bool] = False  # whether its permutes have a list of pairs of their own (`with_neighbours`)

    def __init__(self, axis: Axis = PATCH, bands: Bands | None = None, publishing: Publishing | None = None):
        self.axis, self.bands = axis, bands
        self.publishing = publishing or Publishing()
        self.fresh: Stale = {}
        self.asked: set[str] = set()

    def halo(self, name, x, above, below):
        x = self._without_padding(x)
        return with_neighbours(x, self._publish_edges(name, x, above, below), self.axis, apart=self.APART)

    def kv(self, name, kv):
        own = self._publish(KV, name, self._local_kv(kv))
        return split_kv(self._image_kv(gather_rows(own, self.axis), kv))

    def moments(self, name, x, size):
        own = self._publish(MOMENTS, name, self._own(x, size))
        return pool_moments(gather(own, self.axis), self._shares(x))

    def context(self, part, channels):
        return gather_channels(part)[..., :channels]

    def exact(self) -> Exchange:
        return Synchronous(self.axis, self.bands)

    def finish(self) -> Stale:
        return self.fresh

    def _publish(self, kind: str, name: str, value: Array) -> Array:
        """Keeps what the next step will read of `value`, and returns `value`."""
        if name in self.asked:
            raise KeyError(f"the layer name {name!r} was used twice in one call; every exchanging layer needs its own")
        self.asked.add(name)
        if kind in self.publishing.kinds:
            published = value
            if self.publishing.extrapolate:
                published, self.fresh[name + MEAN] = self._extrapolate(kind, name, value)
            if self.publishing.compress and kind == KV:
                published, self.fresh[name + ENDS] = encode(published, self.publishing.compress)
            self.fresh[name] = published
        return value

    def _publish_edges(self, name: str, x: Float[Array, "b h w c"], above: int, below: int) -> dict[str, Array]:
        """The rows that the neighbours ask for: the last ones for the patch below, the first ones for the one above."""
        edges = {LAST: x[:, x.shape[1] - above :], FIRST: x[:, :below]}
        return {end: self._publish(HALO, name + end, rows) for end, rows in edges.items() if rows.shape[1]}

    def _extrapolate(self, kind: str, name: str, value: Array) -> tuple[Array, Array]:
        """A prediction of the next step's value, and the running mean to go on from: here both begin."""
        return value, value

    def _rows(self, x: Float[Array, "b h w c"]) -> tuple[int, int]:
        """The rows of all bands together and those of the image, at the level of `x`."""
        rows = lax.axis_size(self.axis) * x.shape[1]
        return rows, rows if self.bands is None else self.bands.image_rows(x.shape[1])

    def _in_image(self, x: Float[Array, "b h w c"]) -> Bool[Array, "h"] | None:
        """Which of this band's rows are the image's; None where there is no padding in any band."""
        rows, image = self._rows(x)
        return None if rows == image else first_row(x.shape[1], self.axis) + jnp.arange(x.shape[1]) < image

    def _without_padding(
        self, x: Float[Array, "b h w c"], instead: Float[Array, "b 1 1 c"] | None = None
    ) -> Float[Array, "b h w c"]:
        """`x` with zeros for its padding, or with one pixel of each image."""
        inside = self._in_image(x)
        if inside is None:
            return x
        return jnp.where(inside[None, :, None, None], x, jnp.zeros((), x.dtype) if instead is None else instead)

    def _local_kv(self, kv: Float[Array, "b h w c2"]) -> Float[Array, "b t c2"]:
        """This patch's tokens. Where they are compressed, padding repeats the first, and adds nothing to a channel's range."""
        return flatten_pixels(self._without_padding(kv, kv[:, :1, :1]) if self.publishing.compress else kv)

    def _image_kv(self, everyone: Float[Array, "b t c"], kv: Float[Array, "b h w c2"]) -> Float[Array, "b T c"]:
        return everyone[:, : self._rows(kv)[1] * kv.shape[2]]

    def _own(self, x: Float[Array, "b h w c"], size: int) -> Float[Array, "b g 2"]:
        return local_moments(x, size, self._in_image(x))

    def _shares(self, x: Float[Array, "b h w c"]) -> Float[np.ndarray, "n"]:
        """The part of the image that each patch has."""
        patches, (_, image) = lax.axis_size(self.axis), self._rows(x)
        return np.clip(image - x.shape[1] * np.arange(patches), 0, x.shape[1]).astype(np.float32) / image


def flatten_pixels(x: Float[Array, "b ... c"]) -> Float[Array, "b t c"]:
    """Pixels as tokens, in raster order."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
