"""What the patches tell each other: the only file with collectives.

The image is cut into bands of rows ("patches"), one for each device along the `patch` axis. Three kinds of layers need
something from other bands, and ask an exchange object for it:

      patch i-1  | ........... |          halo(name, x)      rows above and below, for 3x3 convolutions
                 | last row  ──┼──┐       tokens(name, kv)   keys and values of the whole image, for self-attention
      patch i    | ┌─────────┐ |◄─┘       moments(name, m)   mean and variance of the whole image, for GroupNorm
                 | │ x       │ |
                 | └─────────┘ |◄─┐
      patch i+1  | first row ──┼──┘       WholeImage    one device: nothing to ask for, zero padding at the edges
                 | ........... |          Synchronous   blocking and exact; what it publishes starts the stale state
                                          Displaced     what the others published at the previous step, own part fresh;
                                                        and its variants (`STRATEGIES`)

An exchange lives inside one traced call of a model. `finish()` returns what was published: a `Stale`, the next step's
stale state. A new strategy is a new class here, and no line of a model changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from distrijax.config import SyncMode
from distrijax.mesh import CFG, PATCH

Axis = str | tuple[str, ...]

Stale = dict[str, Array]
"""What one patch published at a step, keyed by the path of the layer (local shards, batch first):

halo     [b, above + below, w, c]  its last `above` rows, then its first `below` rows, in the model's dtype
tokens   [b, rows * w, 2 * c]      projected keys and values side by side, in the model's dtype
moments  [b, groups, 2]            mean and variance for each group, float32; in modes that read them
"""


class Exchange(Protocol):
    """The three questions of a layer, and `exact`, with which a model asks them for values that must not be old."""

    def halo(self, name: str, x: Float[Array, "b h w c"], above: int, below: int) -> Float[Array, "b H w c"]: ...

    def tokens(self, name: str, kv: Float[Array, "b t c2"]) -> Float[Array, "b T c2"]: ...

    def moments(self, name: str, m: Float[Array, "b g 2"]) -> Float[Array, "b g 2"]: ...

    def exact(self) -> Exchange: ...

    def finish(self) -> Stale: ...


class WholeImage:
    """The exchange of a device that holds the whole image, or takes its band for one: zero padding, nothing published."""

    def halo(self, name, x, above, below):
        return jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))

    def tokens(self, name, kv):
        return kv

    def moments(self, name, m):
        return m

    def exact(self) -> Exchange:
        return self

    def finish(self) -> Stale:
        return {}


class Synchronous:
    """Blocking exchange of fresh values: exact for any number of patches.

    axis: the mesh axis, or axes, along which the rows are cut. keep_moments: whether the steps that follow read them.
    """

    def __init__(self, axis: Axis = PATCH, *, keep_moments: bool = True):
        self.axis, self.keep_moments = axis, keep_moments
        self.fresh: Stale = {}
        self.asked: set[str] = set()

    def halo(self, name, x, above, below):
        return _with_neighbours(x, self._publish(name, _edges(x, above, below)), above, self.axis)

    def tokens(self, name, kv):
        return lax.all_gather(self._publish(name, kv), self.axis, axis=1, tiled=True)

    def moments(self, name, m):
        return _pooled(lax.all_gather(self._publish(name, m, keep=self.keep_moments), self.axis))

    def exact(self) -> Exchange:
        return Synchronous(self.axis)

    def finish(self) -> Stale:
        return self.fresh

    def _publish(self, name: str, value: Array, *, keep: bool = True) -> Array:
        if name in self.asked:
            raise KeyError(f"the layer name {name!r} was used twice in one call; every exchanging layer needs its own")
        self.asked.add(name)
        if keep:
            self.fresh[name] = value
        return value


class Displaced(Synchronous):
    """DistriFusion's corrected_async_gn: others' values of the previous step, own values fresh.

    stale: what `finish()` returned at the previous step, on this device. No collective here depends on this step's
    activations, so all of them can travel while the device computes. The one exception is the UNet's input, which is asked
    for through `exact`: one fresh row of the latent from each neighbour (the original has the whole latent everywhere).

    GroupNorm: the whole image's stale moments plus the change of the own patch, mean = mean_j m^_j + (m_i - m^_i) and the
    same for E[x^2]; where the resulting variance is negative the own variance is used (arXiv 2402.19481, section 4.2).
    Two deviations from the original's code, both towards exactness: moments are float32, and the variance is the
    population's (torch's GroupNorm) instead of being scaled by n/(n-1) with the local element count.
    """

    KEEPS_MOMENTS: ClassVar[bool] = True

    def __init__(self, stale: Stale, axis: Axis = PATCH):
        super().__init__(axis, keep_moments=self.KEEPS_MOMENTS)
        self.stale = stale

    def halo(self, name, x, above, below):
        fresh = self._publish(name, _edges(x, above, below))
        return _with_neighbours(x, self._previous(name, fresh), above, self.axis)

    def tokens(self, name, kv):
        stale = self._previous(name, self._publish(name, kv))
        everyone = lax.all_gather(stale, self.axis, axis=1, tiled=True)
        return lax.dynamic_update_slice_in_dim(everyone, kv, lax.axis_index(self.axis) * kv.shape[1], axis=1)

    def moments(self, name, m):
        stale = self._previous(name, self._publish(name, m))
        (own_mean, own_variance), (old_mean, old_variance) = _split(m), _split(stale)
        stale_mean, stale_variance = _split(_pooled(lax.all_gather(stale, self.axis)))
        change = own_mean - old_mean
        # E[x^2] - mean^2 of the corrected moments with the squares multiplied out, so that nothing large cancels
        variance = stale_variance + (own_variance - old_variance) + 2 * change * (old_mean - stale_mean)
        return jnp.stack([stale_mean + change, jnp.where(variance < 0, own_variance, variance)], -1)

    def finish(self) -> Stale:
        unused = sorted(self.stale.keys() - self.fresh.keys())
        if unused:
            raise KeyError(f"stale state was never read: {', '.join(unused)}; it belongs to another model")
        return self.fresh

    def _previous(self, name: str, fresh: Array) -> Array:
        if name not in self.stale:
            raise KeyError(f"no stale state for {name!r}; create it with a synchronous step of the same model")
        stale = self.stale[name]
        if (stale.shape, stale.dtype) != (fresh.shape, fresh.dtype):
            raise ValueError(
                f"{name}: stale state is {stale.dtype}{list(stale.shape)} and this step's is {fresh.dtype}"
                f"{list(fresh.shape)}; a displaced step needs the synchronous step's sizes and dtype"
            )
        return stale


class StaleMoments(Displaced):
    """stale_gn: the moments, too, are the others' previous ones beside the own fresh ones."""

    def moments(self, name, m):
        everyone = lax.all_gather(self._previous(name, self._publish(name, m)), self.axis)
        return _pooled(lax.dynamic_update_index_in_dim(everyone, m, lax.axis_index(self.axis), axis=0))


class FreshMoments(Displaced):
    """sync_gn: a blocking exchange of the moments at every step; halo and tokens are displaced."""

    KEEPS_MOMENTS = False
    moments = Synchronous.moments


class OwnMoments(Displaced):
    """separate_gn: every patch is normalised by itself; halo and tokens are displaced."""

    KEEPS_MOMENTS = False

    def moments(self, name, m):
        return self._publish(name, m, keep=False)


class Frozen(OwnMoments):
    """no_sync: what the others published at the last step of the warm-up, for ever; own moments.

    The original's numbers, not its traffic: the same values are gathered again at every step.
    """

    def finish(self) -> Stale:
        super().finish()
        return self.stale


STRATEGIES: dict[SyncMode, type[Displaced]] = {
    SyncMode.CORRECTED_ASYNC_GN: Displaced,
    SyncMode.STALE_GN: StaleMoments,
    SyncMode.SYNC_GN: FreshMoments,
    SyncMode.SEPARATE_GN: OwnMoments,
    SyncMode.NO_SYNC: Frozen,
}
"""What follows the warm-up in each mode; full_sync has nothing to follow it."""


def strategy_of(mode: SyncMode, patches: int) -> type[Displaced] | None:
    """What follows the warm-up; None where every step is synchronous, as with one patch, which has nobody to wait for."""
    return STRATEGIES.get(mode) if patches > 1 else None


def branch_sum(x: Array) -> Array:
    """Sum over the guidance branches that live on the two halves of the mesh."""
    return lax.psum(x, CFG)


def for_each_branch(x: Array) -> Array:
    """`x`, the same for all guidance branches, as the input of a computation in which they differ."""
    return lax.pcast(x, CFG, to="varying")


def whole_image_std(x: Float[Array, "b h w c"], axis: Axis) -> Float[Array, "b 1 1 1"]:
    """Standard deviation of each whole latent (all rows, columns and channels), n - 1 below the line like torch.std."""
    count = x[0].size * lax.axis_size(axis)
    mean = lax.psum(jnp.sum(x, (1, 2, 3), keepdims=True), axis) / count
    squares = lax.psum(jnp.sum(jnp.square(x - mean), (1, 2, 3), keepdims=True), axis)
    return jnp.sqrt(squares / (count - 1))


def on_columns(function: Callable[[Array], Array], x: Float[Array, "b h w c"], axis: Axis) -> Float[Array, "b h w c"]:
    """`function` of this patch's band of columns, where `x` and the result are its band of rows."""
    columns = lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    return lax.all_to_all(function(columns), axis, split_axis=1, concat_axis=2, tiled=True)


def first_row(rows: int, axis: Axis) -> Array:
    """The global index of this patch's first row, when every patch has `rows`."""
    return lax.axis_index(axis) * rows


def _edges(x: Array, above: int, below: int) -> Array:
    """The rows that the neighbours will ask for: the last ones for the patch below, the first ones for the one above."""
    return jnp.concatenate([x[:, x.shape[1] - above :], x[:, :below]], 1)


def _with_neighbours(x: Array, edges: Array, above: int, axis: Axis) -> Array:
    """`x` between the edges that its neighbours published; ppermute leaves zeros at the image's border."""
    n = lax.axis_size(axis)
    down, up = [(i, i + 1) for i in range(n - 1)], [(i + 1, i) for i in range(n - 1)]
    parts = [lax.ppermute(edges[:, :above], axis, down)] if above else []
    parts.append(x)
    if edges.shape[1] > above:
        parts.append(lax.ppermute(edges[:, above:], axis, up))
    return jnp.concatenate(parts, 1)


def _split(moments: Array) -> tuple[Array, Array]:
    return moments[..., 0], moments[..., 1]


def _pooled(moments: Float[Array, "n b g 2"]) -> Float[Array, "b g 2"]:
    """The whole image's mean and variance from those of patches of equal size (law of total variance)."""
    means, variances = _split(moments)
    mean = jnp.mean(means, 0)
    return jnp.stack([mean, jnp.mean(variances, 0) + jnp.mean(jnp.square(means - mean[None]), 0)], -1)
