"""Displaced exchanges: the strategies of the steps after the warm-up, one class for each sync mode."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from distrijax.config import Compression, DistriConfig, SyncMode
from distrijax.parallel.bands import Bands
from distrijax.parallel.collectives import Axis, all_patches, gather_kv, with_neighbours
from distrijax.parallel.compression import dequantize
from distrijax.parallel.exchange import (
    CHANNEL_RANGE,
    HALO,
    KV,
    MOMENTS,
    Exchange,
    Publishing,
    Stale,
    Synchronous,
    ema,
)
from distrijax.parallel.mesh import PATCH
from distrijax.parallel.moments import pool_moments, split_moments

EMA_DECAY = 2 / 3
"""The weight of the past in the exponential moving averages that extrapolation uses."""


class Displaced(Synchronous):
    """corrected_async_gn, DistriFusion's default: the other patches' values of the previous step, the own ones of this step.

    No collective here needs this step's activations, so all of them can overlap with compute. The one exception is the UNet's
    first layer, which asks through `exact`: it needs one row of this step's latent from each neighbour (in the original every
    device has the whole latent).

    GroupNorm corrects the whole image's stale moments by the own patch's change since the previous step:

        mean = stale mean + a (own mean - own stale mean), and the same for E[x^2]

    The factor `a`, the `correction`, is 1: the other patches are assumed to have changed as this one did. If the resulting
    variance is negative, the own variance is used. Two deviations from the original's code, both towards exactness: moments
    are float32, and the variance is the population's (as in torch's GroupNorm) instead of being scaled by n / (n - 1) with
    the local element count.

    With extrapolation a patch publishes a prediction: its value plus `step_ratio` times the change of its exponential moving
    average at this step, which is smoother than the change of the value itself.

    Args:
        stale: What `finish()` returned at the previous step, on this device.
        axis: The mesh axis, or axes, along which the rows are sharded.
        bands: How the rows are divided, if they do not fill the bands; None if they do.
        publishing: What the next step will read; None publishes all that this strategy reads.
        step_ratio: The distance in time to the next step over the distance from the previous one, for extrapolation.

    References:
        DistriFusion, arXiv 2402.19481, section 4.2.
    """

    KEEPS: ClassVar[frozenset[str]] = frozenset({HALO, KV, MOMENTS})

    def __init__(
        self,
        stale: Stale,
        axis: Axis = PATCH,
        bands: Bands | None = None,
        publishing: Publishing | None = None,
        step_ratio: Float[Array, ""] | float = 1.0,
    ):
        super().__init__(axis, bands, publishing or Publishing(self.KEEPS))
        self.stale, self.step_ratio = stale, step_ratio
        self._moments: dict[str, Float[Array, "n b g 2"]] = {}
        self._last_kv: Float[Array, "b h w c2"] | None = None  # of the attention before this one

    def halo(self, name, x, above, below):
        x = self._without_padding(x)
        own = self._publish_edges(name, x, above, below)
        return with_neighbours(x, {end: self._previous(HALO, name + end) for end in own}, self.axis)

    def kv(self, name, kv):
        before, self._last_kv = self._last_kv, kv
        own, compression = self._local_kv(kv), self.publishing.compress
        stale = tuple(self._read(kind, name) for kind in ((KV, CHANNEL_RANGE) if compression else (KV,)))
        restore = partial(dequantize, compression=compression) if compression else lambda kv: kv
        self._check(name, jax.eval_shape(restore, *stale), own)
        padded = self._in_image(kv) is not None  # without padding the order of keys does not matter
        own, *everyone = gather_kv(own, stale, restore, self.axis, in_order=padded, after=before)
        self._publish(KV, name, own)
        keys, values = (self._image_kv(each, kv) for each in everyone)
        return keys, values

    def moments(self, name, x, size):
        own = self._publish(MOMENTS, name, self._band_moments(x, size))
        stale = self._previous(MOMENTS, name)
        (own_mean, own_variance), (old_mean, old_variance) = split_moments(own), split_moments(stale)
        stale_mean, stale_variance = split_moments(pool_moments(self._stale_moments(name), self._band_shares(x)))
        change, a = own_mean - old_mean, self.correction(x)
        # E[x^2] - mean^2 of the corrected moments with the squares multiplied out, so that nothing large cancels
        shift = 2 * (old_mean - stale_mean) + (1 - a) * change
        variance = stale_variance + a * ((own_variance - old_variance) + change * shift)
        return jnp.stack([stale_mean + a * change, jnp.where(variance < 0, own_variance, variance)], -1)

    def exact(self) -> Exchange:
        return _SeparatePermutes(self.axis, self.bands)

    def correction(self, x: Float[Array, "b h w c"]) -> Array | float:
        """The factor with which the own patch's change enters the whole image's moments.

        Args:
            x: The patch.

        Returns:
            A scalar.
        """
        return 1.0

    def _extrapolate(self, kind, name, value):
        average = self._read(ema(kind), name)
        step = (1 - EMA_DECAY) * (value - average)
        predicted = value + jnp.asarray(self.step_ratio, value.dtype) * step
        if kind == MOMENTS:
            predicted = jnp.stack([predicted[..., 0], jnp.maximum(predicted[..., 1], 0)], -1)
        return predicted, average + step

    def finish(self) -> Stale:
        unused = sorted(self.stale.keys() - self.fresh.keys())
        if unused:
            names = ", ".join(f"{kind} of {name}" for kind, name in unused)
            raise KeyError(f"stale state was never read: {names}; it belongs to another model")
        return self.fresh

    def _read(self, kind: str, name: str) -> Array:
        if (kind, name) not in self.stale:
            raise KeyError(f"no stale {kind} for {name!r}; create it with a synchronous step of the same model")
        return self.stale[kind, name]

    def _previous(self, kind: str, name: str) -> Array:
        stale = self._read(kind, name)
        self._check(name, stale, self.fresh[kind, name])
        return stale

    def _stale_moments(self, name: str) -> Float[Array, "n b g 2"]:
        """All patches' stale moments of a layer. One all-gather brings those of all layers, because each is only a few bytes."""
        if not self._moments:
            parts = {each: leaf for (kind, each), leaf in self.stale.items() if kind == MOMENTS}
            splits = np.cumsum([leaf.size // 2 for leaf in parts.values()])[:-1]
            own = jnp.concatenate([leaf.reshape(-1, 2) for leaf in parts.values()])
            gathered = all_patches(own, self.axis)
            pieces = zip(parts.items(), jnp.split(gathered, splits, axis=1), strict=True)
            self._moments |= {each: piece.reshape(-1, *leaf.shape) for (each, leaf), piece in pieces}
        return self._moments[name]

    @staticmethod
    def _check(name: str, stale: Array | jax.ShapeDtypeStruct, fresh: Array) -> None:
        if (stale.shape, stale.dtype) != (fresh.shape, fresh.dtype):
            raise ValueError(
                f"{name}: stale state is {stale.dtype}{list(stale.shape)} and this step's is {fresh.dtype}"
                f"{list(fresh.shape)}; a displaced step needs the synchronous step's sizes and dtype"
            )


class _SeparatePermutes(Synchronous):
    """Exact answers within a displaced step, whose permutes do not wait for those of stale values."""

    SEPARATE_PERMUTES = True


class StaleGN(Displaced):
    """stale_gn: moments of the others' stale values and the own fresh ones, so the correction is the own share of the image."""

    def correction(self, x):
        return jnp.asarray(self._band_shares(x))[lax.axis_index(self.axis)]


class DampedAsyncGN(Displaced):
    """damped_async_gn: half of the correction.

    If a patch changes differently from the others, the full correction overshoots, and GroupNorm diverges where the variance
    comes near zero. Half of it does not (figures in docs/staleness.md).
    """

    def correction(self, x):
        return 0.5


class SyncGN(Displaced):
    """sync_gn: moments are exchanged at every step, blocking; halo rows, keys and values are displaced."""

    KEEPS = frozenset({HALO, KV})
    moments = Synchronous.moments


class AsyncTokens(SyncGN):
    """async_tokens: moments and halo rows, which are small, are exchanged blocking; only keys and values are displaced."""

    KEEPS = frozenset({KV})
    halo = Synchronous.halo


class SeparateGN(Displaced):
    """separate_gn: each patch is normalised by its own moments; halo rows, keys and values are displaced."""

    KEEPS = frozenset({HALO, KV})

    def moments(self, name, x, size):
        return self._publish(MOMENTS, name, self._band_moments(x, size))


class NoSync(SeparateGN):
    """no_sync: the other patches' values stay those of the last warm-up step; moments are the own ones.

    The numbers are the original's, the traffic is not: the same values are sent again at every step.
    """

    def finish(self) -> Stale:
        super().finish()
        return self.stale


STRATEGIES: dict[SyncMode, type[Displaced]] = {
    SyncMode.CORRECTED_ASYNC_GN: Displaced,
    SyncMode.DAMPED_ASYNC_GN: DampedAsyncGN,
    SyncMode.ASYNC_TOKENS: AsyncTokens,
    SyncMode.STALE_GN: StaleGN,
    SyncMode.SYNC_GN: SyncGN,
    SyncMode.SEPARATE_GN: SeparateGN,
    SyncMode.NO_SYNC: NoSync,
}
"""The strategy after the warm-up for each sync mode. full_sync has none: all its steps are synchronous."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What a displaced step exchanges, and so what the step before it publishes.

    Attributes:
        kind: The class of its exchange.
        extrapolate: Whether predictions of the next step's values are published instead of this step's values.
        compress: How keys and values are compressed, if at all.
    """

    kind: type[Displaced]
    extrapolate: bool = False
    compress: Compression | None = None

    def __call__(
        self, stale: Stale, axis: Axis = PATCH, bands: Bands | None = None, step_ratio: Float[Array, ""] | float = 1.0
    ) -> Displaced:
        """The exchange of one step; arguments as those of `Displaced`."""
        return self.kind(stale, axis, bands, self.publishing, step_ratio)

    @property
    def publishing(self) -> Publishing:
        """What every step publishes for a step of this strategy."""
        return Publishing(self.kind.KEEPS, self.extrapolate, self.compress)


def strategy_of(config: DistriConfig, patches: int) -> Strategy | None:
    """The strategy after the warm-up; None if all steps are synchronous, as they are with a single patch.

    Args:
        config: The run's configuration.
        patches: Number of patches of an image.
    """
    if config.sync_mode not in STRATEGIES or patches == 1:
        return None
    return Strategy(STRATEGIES[config.sync_mode], config.extrapolate, config.compress)
