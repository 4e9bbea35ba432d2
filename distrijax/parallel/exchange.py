"""What the devices tell each other: the only file with collectives.

The image is cut into bands of rows ("patches"), one for each device along the `patch` axis. Three kinds of layers need
something from other bands, and ask an exchange object for it:

      patch i-1  | ........... |          halo(name, x)          rows above and below, for 3x3 convolutions
                 | last row  ──┼──┐       tokens(name, kv)       keys and values of the whole image, for self-attention
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
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from distrijax.compression import decode, encode
from distrijax.config import Compression, DistriConfig, SyncMode
from distrijax.mesh import CFG, EVERY_AXIS, PATCH, Bands

Axis = str | tuple[str, ...]

KeysValues = tuple[Array, Array]
"""Keys and values, of the same shape."""

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

HALO, TOKENS, MOMENTS = "halo", "tokens", "moments"

LAST, FIRST = ".last", ".first"
"""What the names of a patch's last and first rows end in. They are sent to different patches: apart, neither is copied for it."""

ENDS, MEAN = ".ends", ".mean"
"""What the names of the ends of compressed tokens' channels and of running means end in."""

MEMORY = 2 / 3
"""The part of the running mean that stays from step to step."""


class Exchange(Protocol):
    """The questions of a layer, and `exact`, with which a model asks them for values that must not be old.

    tokens: takes the keys and values of a patch side by side, and returns everyone's, [b, T, c] each.
    channels, whole_sum: of layers whose input channels may be divided among devices: this device's `count` of the channels,
    and the sum of everyone's products with their part of the weights. context: keys or values of the prompt, of this device's
    part of their channels, for as many as the model has in all; every device has made its part.
    """

    def halo(self, name: str, x: Float[Array, "b h w c"], above: int, below: int) -> Float[Array, "b H w c"]: ...

    def tokens(self, name: str, kv: Float[Array, "b h w c2"]) -> KeysValues: ...

    def moments(self, name: str, x: Float[Array, "b h w c"], size: int) -> Float[Array, "b g 2"]: ...

    def channels(self, x: Float[Array, "... c"], count: int) -> Float[Array, "... {count}"]: ...

    def whole_sum(self, x: Float[Array, "..."]) -> Float[Array, "..."]: ...

    def context(self, part: Float[Array, "... c"], channels: int) -> Float[Array, "... C"]: ...

    def exact(self) -> Exchange: ...

    def finish(self) -> Stale: ...


class WholeImage:
    """The exchange of a device that holds the whole image, or takes its band for one: zero padding, nothing published."""

    def halo(self, name, x, above, below):
        return jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))

    def tokens(self, name, kv):
        return _halves(_flat(kv))

    def moments(self, name, x, size):
        return _own_moments(x, size)

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


class PartOfChannels(WholeImage):
    """Tensor parallelism (arXiv 1909.08053): every device has the whole image and its part of the inner channels.

    axis: the mesh axis along which `distrijax.tensor` has cut the weights.
    """

    def __init__(self, axis: Axis = PATCH):
        self.axis = axis

    def channels(self, x, count):
        if x.shape[-1] == count:  # a layer before this one was cut alike
            return x
        whole = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lax.axis_size(self.axis) * count - x.shape[-1])])
        return lax.dynamic_slice_in_dim(whole, lax.axis_index(self.axis) * count, count, axis=-1)

    def whole_sum(self, x):
        return lax.psum(x, self.axis)


class Synchronous(WholeImage):
    """Blocking exchange of fresh values: exact for any number of patches.

    axis: the mesh axis, or axes, along which the rows are cut. bands: where the image's rows do not fill the bands; None
    where they do. strategy: of the step that follows, and so what to publish; None publishes everything.
    """

    APART: ClassVar[bool] = False  # whether its permutes have a list of pairs of their own (`_with_neighbours`)

    def __init__(self, axis: Axis = PATCH, bands: Bands | None = None, strategy: Strategy | None = None):
        self.axis, self.bands = axis, bands
        self.strategy = strategy or Strategy(Displaced)
        self.fresh: Stale = {}
        self.asked: set[str] = set()

    def halo(self, name, x, above, below):
        x = self._without_padding(x)
        return _with_neighbours(x, self._publish_edges(name, x, above, below), self.axis, apart=self.APART)

    def tokens(self, name, kv):
        own = self._publish(TOKENS, name, self._own_tokens(kv))
        return _halves(self._image_tokens(lax.all_gather(own, self.axis, axis=1, tiled=True), kv))

    def moments(self, name, x, size):
        own = self._publish(MOMENTS, name, self._own(x, size))
        return _pooled(lax.all_gather(own, self.axis), self._shares(x))

    def context(self, part, channels):
        everyone = lax.all_gather(part, (PATCH, CFG), axis=part.ndim - 1, tiled=True, to="invarying")
        return everyone[..., :channels]

    def exact(self) -> Exchange:
        return Synchronous(self.axis, self.bands)

    def finish(self) -> Stale:
        return self.fresh

    def _publish(self, kind: str, name: str, value: Array) -> Array:
        """Keeps what the next step will read of `value`, and returns `value`."""
        if name in self.asked:
            raise KeyError(f"the layer name {name!r} was used twice in one call; every exchanging layer needs its own")
        self.asked.add(name)
        if kind in self.strategy.kind.KEEPS:
            published = value
            if self.strategy.extrapolate:
                published, self.fresh[name + MEAN] = self._ahead(kind, name, value)
            if self.strategy.compress and kind == TOKENS:
                published, self.fresh[name + ENDS] = encode(published, self.strategy.compress)
            self.fresh[name] = published
        return value

    def _publish_edges(self, name: str, x: Float[Array, "b h w c"], above: int, below: int) -> dict[str, Array]:
        """The rows that the neighbours ask for: the last ones for the patch below, the first ones for the one above."""
        edges = {LAST: x[:, x.shape[1] - above :], FIRST: x[:, :below]}
        return {end: self._publish(HALO, name + end, rows) for end, rows in edges.items() if rows.shape[1]}

    def _ahead(self, kind: str, name: str, value: Array) -> tuple[Array, Array]:
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

    def _own_tokens(self, kv: Float[Array, "b h w c2"]) -> Float[Array, "b t c2"]:
        """This patch's tokens. Where they are compressed, padding repeats the first, and adds nothing to a channel's range."""
        return _flat(self._without_padding(kv, kv[:, :1, :1]) if self.strategy.compress else kv)

    def _image_tokens(self, everyone: Float[Array, "b t c"], kv: Float[Array, "b h w c2"]) -> Float[Array, "b T c"]:
        return everyone[:, : self._rows(kv)[1] * kv.shape[2]]

    def _own(self, x: Float[Array, "b h w c"], size: int) -> Float[Array, "b g 2"]:
        return _own_moments(x, size, self._in_image(x))

    def _shares(self, x: Float[Array, "b h w c"]) -> Float[np.ndarray, "n"]:
        """The part of the image that each patch has."""
        patches, (_, image) = lax.axis_size(self.axis), self._rows(x)
        return np.clip(image - x.shape[1] * np.arange(patches), 0, x.shape[1]).astype(np.float32) / image


class Displaced(Synchronous):
    """DistriFusion's corrected_async_gn: others' values of the previous step, own values fresh.

    stale: what `finish()` returned at the previous step, on this device. pace: the distance to the next step over that from
    the previous one, for extrapolation: what is published is then the fresh value and, at that pace, the way it has gone
    from its running mean, which is smoother than the last step alone. No collective here needs this step's
    activations, so all of them can travel while the device computes. The one exception is the UNet's input, which is asked
    for through `exact`: one fresh row of the latent from each neighbour (the original has the whole latent everywhere).

    GroupNorm: the whole image's stale moments plus the change of the own patch, mean = mean_j m^_j + a (m_i - m^_i) and the
    same for E[x^2], where a, the `correction`, is 1: the other patches are taken to have changed as this one did. Where the
    resulting variance is negative the own variance is used (arXiv 2402.19481, section 4.2). Two deviations from the
    original's code, both towards exactness: moments are float32, and the variance is the population's (torch's GroupNorm)
    instead of being scaled by n/(n-1) with the local element count.
    """

    KEEPS: ClassVar[frozenset[str]] = frozenset({HALO, TOKENS, MOMENTS})

    def __init__(
        self,
        stale: Stale,
        axis: Axis = PATCH,
        bands: Bands | None = None,
        strategy: Strategy | None = None,
        pace: Float[Array, ""] | float = 1.0,
    ):
        super().__init__(axis, bands, strategy or Strategy(type(self)))
        self.stale, self.pace = stale, pace
        self._moments: dict[str, Float[Array, "n b g 2"]] | None = None
        self._last_tokens: Float[Array, "b h w c2"] | None = None  # of the layer before

    def halo(self, name, x, above, below):
        x = self._without_padding(x)
        own = self._publish_edges(name, x, above, below)
        return _with_neighbours(x, {end: self._previous(name + end) for end in own}, self.axis)

    def tokens(self, name, kv):
        before, self._last_tokens = self._last_tokens, kv
        own, compression = self._own_tokens(kv), self.strategy.compress
        stale = tuple(self._read(each) for each in ((name, name + ENDS) if compression else (name,)))
        restore = partial(decode, compression=compression) if compression else lambda tokens: tokens
        self._check(name, jax.eval_shape(restore, *stale), own)
        padded = self._in_image(kv) is not None  # else attention does not depend on the order
        own, *everyone = _own_among_all(own, stale, restore, self.axis, in_order=padded, after=before)
        self._publish(TOKENS, name, own)
        keys, values = (self._image_tokens(each, kv) for each in everyone)
        return keys, values

    def moments(self, name, x, size):
        own = self._publish(MOMENTS, name, self._own(x, size))
        stale = self._previous(name)
        (own_mean, own_variance), (old_mean, old_variance) = _split(own), _split(stale)
        stale_mean, stale_variance = _split(_pooled(self._stale_moments(name), self._shares(x)))
        change, a = own_mean - old_mean, self.correction(x)
        # E[x^2] - mean^2 of the corrected moments with the squares multiplied out, so that nothing large cancels
        shift = 2 * (old_mean - stale_mean) + (1 - a) * change
        variance = stale_variance + a * ((own_variance - old_variance) + change * shift)
        return jnp.stack([stale_mean + a * change, jnp.where(variance < 0, own_variance, variance)], -1)

    def exact(self) -> Exchange:
        return _Apart(self.axis, self.bands)

    def correction(self, x: Float[Array, "b h w c"]) -> Array | float:
        """How much of the own patch's change goes into the whole image's moments."""
        return 1.0

    def _ahead(self, kind, name, value):
        mean = self._read(name + MEAN)
        step = (1 - MEMORY) * (value - mean)
        predicted = value + jnp.asarray(self.pace, value.dtype) * step
        if kind == MOMENTS:
            predicted = jnp.stack([predicted[..., 0], jnp.maximum(predicted[..., 1], 0)], -1)
        return predicted, mean + step

    def finish(self) -> Stale:
        unused = sorted(self.stale.keys() - self.fresh.keys())
        if unused:
            raise KeyError(f"stale state was never read: {', '.join(unused)}; it belongs to another model")
        return self.fresh

    def _read(self, name: str) -> Array:
        if name not in self.stale:
            raise KeyError(f"no stale state for {name!r}; create it with a synchronous step of the same model")
        return self.stale[name]

    def _previous(self, name: str) -> Array:
        stale = self._read(name)
        self._check(name, stale, self.fresh[name])
        return stale

    def _stale_moments(self, name: str) -> Float[Array, "n b g 2"]:
        """All patches' stale moments of a layer; those of all layers travel together, for each is next to nothing."""
        if self._moments is None:
            parts = {each: leaf for each, leaf in self.stale.items() if _is_moments(each, leaf)}
            ends = np.cumsum([leaf.size // 2 for leaf in parts.values()])[:-1]
            own = jnp.concatenate([leaf.reshape(-1, 2) for leaf in parts.values()])
            together = _everyone(own, self.axis)
            gathered = zip(parts.items(), jnp.split(together, ends, axis=1), strict=True)
            self._moments = {each: piece.reshape(-1, *leaf.shape) for (each, leaf), piece in gathered}
        return self._moments[name]

    @staticmethod
    def _check(name: str, stale: Array | jax.ShapeDtypeStruct, fresh: Array) -> None:
        if (stale.shape, stale.dtype) != (fresh.shape, fresh.dtype):
            raise ValueError(
                f"{name}: stale state is {stale.dtype}{list(stale.shape)} and this step's is {fresh.dtype}"
                f"{list(fresh.shape)}; a displaced step needs the synchronous step's sizes and dtype"
            )


class _Apart(Synchronous):
    """The synchronous answers beside a displaced step's: nothing fresh waits for what is stale."""

    APART = True


class StaleMoments(Displaced):
    """stale_gn: the moments are the others' previous ones beside the own fresh ones, a correction by the own share."""

    def correction(self, x):
        return jnp.asarray(self._shares(x))[lax.axis_index(self.axis)]


class DampedMoments(Displaced):
    """damped_async_gn: half of the correction.

    Where a patch changes otherwise than the rest, the whole correction overshoots, and a variance near zero makes GroupNorm
    blow up; a half does not (figures in docs/staleness.md).
    """

    def correction(self, x):
        return 0.5


class FreshMoments(Displaced):
    """sync_gn: a blocking exchange of the moments at every step; halo and tokens are displaced."""

    KEEPS = frozenset({HALO, TOKENS})
    moments = Synchronous.moments


class FreshRows(FreshMoments):
    """async_tokens: blocking exchanges of what is small, moments and boundary rows; only tokens are displaced."""

    KEEPS = frozenset({TOKENS})
    halo = Synchronous.halo


class OwnMoments(Displaced):
    """separate_gn: every patch is normalised by itself; halo and tokens are displaced."""

    KEEPS = frozenset({HALO, TOKENS})

    def moments(self, name, x, size):
        return self._publish(MOMENTS, name, self._own(x, size))


class Frozen(OwnMoments):
    """no_sync: what the others published at the last step of the warm-up, for ever; own moments.

    The original's numbers, not its traffic: the same values are sent again at every step.
    """

    def finish(self) -> Stale:
        super().finish()
        return self.stale


KINDS: dict[SyncMode, type[Displaced]] = {
    SyncMode.CORRECTED_ASYNC_GN: Displaced,
    SyncMode.DAMPED_ASYNC_GN: DampedMoments,
    SyncMode.ASYNC_TOKENS: FreshRows,
    SyncMode.STALE_GN: StaleMoments,
    SyncMode.SYNC_GN: FreshMoments,
    SyncMode.SEPARATE_GN: OwnMoments,
    SyncMode.NO_SYNC: Frozen,
}
"""What follows the warm-up in each mode; full_sync has nothing to follow it."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What a displaced step exchanges, and so what the step before it publishes.

    extrapolate: predictions of the next step's values instead of this step's. compress: how tokens travel, if not as they are.
    """

    kind: type[Displaced]
    extrapolate: bool = False
    compress: Compression | None = None

    def __call__(
        self, stale: Stale, axis: Axis = PATCH, bands: Bands | None = None, pace: Float[Array, ""] | float = 1.0
    ) -> Displaced:
        return self.kind(stale, axis, bands, self, pace)


def strategy_of(config: DistriConfig, patches: int) -> Strategy | None:
    """What follows the warm-up; None where every step is synchronous, as with one patch, which has nobody to wait for."""
    if config.sync_mode not in KINDS or patches == 1:
        return None
    return Strategy(KINDS[config.sync_mode], config.extrapolate, config.compress)


def own_branches(x: Float[Array, "k ..."]) -> Float[Array, "j ..."]:
    """Those of all guidance branches that are this device's."""
    count = x.shape[0] // lax.axis_size(CFG)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(CFG) * count, count)


def joined(share: Float[Array, "n"]) -> Float[Array, "N"]:
    """A flat array of which every device of the mesh has an equal piece."""
    return lax.all_gather(share, EVERY_AXIS, tiled=True, to="invarying")


def branch_sum(x: Array) -> Array:
    """Sum over the guidance branches that live on the two halves of the mesh."""
    return lax.psum(x, CFG)


def for_each_branch(x: Array) -> Array:
    """`x`, the same for all guidance branches, as the input of a computation in which they differ."""
    return lax.pcast(x, CFG, to="varying")


def on_columns(function: Callable[[Array], Array], x: Float[Array, "b h w c"], axis: Axis) -> Float[Array, "b h w c"]:
    """`function` of this patch's band of columns, where `x` and the result are its band of rows."""
    columns = lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    return lax.all_to_all(function(columns), axis, split_axis=1, concat_axis=2, tiled=True)


def first_row(rows: int, axis: Axis) -> Array:
    """The global index of this patch's first row (or token), when every patch has `rows`."""
    return lax.axis_index(axis) * rows


def _flat(x: Float[Array, "b ... c"]) -> Float[Array, "b t c"]:
    """Pixels as tokens, in raster order."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _with_neighbours(x: Array, edges: dict[str, Array], axis: Axis, *, apart: bool = False) -> Array:
    """`x` between the edges that its neighbours published; ppermute leaves zeros at the image's border.

    apart: XLA combines permutes of equal lists of pairs, and then all wait for the latest. These have a list of their own:
    the same pairs the other way round.
    """
    n = lax.axis_size(axis)
    order = range(n - 1)[:: -1 if apart else 1]
    down, up = [(i, i + 1) for i in order], [(i + 1, i) for i in order]
    above = [lax.ppermute(edges[LAST], axis, down)] if LAST in edges else []
    below = [lax.ppermute(edges[FIRST], axis, up)] if FIRST in edges else []
    return jnp.concatenate([*above, x, *below], 1)


def _everyone(x: Shaped[Array, "..."], axis: Axis) -> Shaped[Array, "n ..."]:
    """All patches' `x`, which is there long before it is read. On TPUs by permutes (`_from_own_on`), on others by a gather."""

    def permuted(x):
        return jnp.roll(jnp.stack(_from_own_on(x, axis)), lax.axis_index(axis), 0)

    return lax.platform_dependent(x, tpu=permuted, default=lambda x: lax.all_gather(x, axis))


def _own_among_all(
    own: Float[Array, "b t c2"],
    stale: tuple[Shaped[Array, "b ..."], ...],
    restore: Callable[..., Array],
    axis: Axis,
    *,
    in_order: bool,
    after: Array | None,
) -> tuple[Float[Array, "b t c2"], Float[Array, "b T c"], Float[Array, "b T c"]]:
    """This patch's fresh tokens, for it to publish, and all patches' keys and values: these, and the others' stale ones.

    stale: what the patches published of theirs, and `restore` makes tokens of. in_order: whether patch follows patch; on TPUs
    they otherwise begin with this one. after: what is computed on TPUs before the permutes begin. Without it XLA begins all
    permutes of a step at once, more than can be under way, and what they bring waits in memory.
    """

    def gathered(own, stale, after):
        everyone = restore(*(jnp.moveaxis(lax.all_gather(part, axis), 0, 1) for part in stale))
        # what is published can take the stale value's place in memory as soon as that has been sent; XLA would leave such
        # writing to the end of the step, and until then hold everything twice
        own = _after(own, everyone)
        everyone = lax.dynamic_update_slice_in_dim(everyone, own[:, None], lax.axis_index(axis), axis=1)
        return own, *_halves(everyone.reshape(own.shape[0], -1, own.shape[-1]))

    def permuted(own, stale, after):
        parts = (_from_own_on(part if after is None else _after(part, after), axis) for part in stale)
        _, *others = zip(*parts, strict=True)
        # keys apart from values: XLA would put all side by side, and then copy each out of that
        everyone = zip(*map(_halves, (own, *(restore(*part) for part in others))), strict=True)
        shift = lax.axis_index(axis) * own.shape[1] if in_order else 0
        return own, *(jnp.roll(jnp.concatenate(each, 1), shift, 1) for each in everyone)

    return lax.platform_dependent(own, stale, after, tpu=permuted, default=gathered)


def _from_own_on(x: Shaped[Array, "..."], axis: Axis) -> list[Shaped[Array, "..."]]:
    """This patch's `x`, that of the next one, and so on, round: each by a permute, which can travel beside any computing.

    A gather travels only inside kernels of products on TPUs, and at SDXL's widths some find none.
    """
    n = lax.axis_size(axis)
    return [x, *(lax.ppermute(x, axis, [((i + far) % n, i) for i in range(n)]) for far in range(1, n))]


def _after(x: Array, read: Array) -> Array:
    """`x`, but not before the first number of `read` is there: XLA may else compute it far too early, or too late."""
    zero = jnp.minimum(jnp.abs(read[(0,) * read.ndim]), 0)  # for XLA not a constant, so x now depends on `read`
    return lax.optimization_barrier(x + zero.astype(x.dtype))


def _halves(kv: Float[Array, "b t c2"]) -> KeysValues:
    keys, values = jnp.split(kv, 2, -1)
    return keys, values


def _split(moments: Array) -> tuple[Array, Array]:
    return moments[..., 0], moments[..., 1]


def _is_moments(name: str, leaf: Array) -> bool:
    """Whether a stale value is moments, and no running mean of them; others have another shape or dtype (`Stale`)."""
    return leaf.ndim == 3 and leaf.shape[-1] == 2 and leaf.dtype == jnp.float32 and not name.endswith((MEAN, ENDS))


def _own_moments(
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


def _pooled(moments: Float[Array, "n b g 2"], shares: Float[np.ndarray, "n"]) -> Float[Array, "b g 2"]:
    """The whole image's mean and variance from those of patches and their shares in it (law of total variance)."""
    means, variances = _split(moments)
    shares = shares[:, None, None]
    mean = jnp.sum(shares * means, 0)
    return jnp.stack([mean, jnp.sum(shares * (variances + jnp.square(means - mean[None])), 0)], -1)
