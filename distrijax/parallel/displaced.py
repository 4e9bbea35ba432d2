"""Displaced exchanges: the strategies that follow the warm-up, one class for each sync mode."""

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
from distrijax.parallel.compression import decode
from distrijax.parallel.exchange import ENDS, HALO, KV, MEAN, MOMENTS, Exchange, Publishing, Stale, Synchronous
from distrijax.parallel.mesh import PATCH
from distrijax.parallel.moments import pool_moments, split_moments

EMA_DECAY = 2 / 3
"""The part of the running mean that stays from step to step."""


class Displaced(Synchronous):
    """DistriFusion's corrected_async_gn: others' values of the previous step, own values fresh.

    stale: what `finish()` returned at the previous step, on this device. step_ratio: the distance to the next step over that from
    the previous one, for extrapolation: what is published is then the fresh value and, times that ratio, the way it has gone
    from its running mean, which is smoother than the last step alone. No collective here needs this step's
    activations, so all of them can travel while the device computes. The one exception is the UNet's input, which is asked
    for through `exact`: one fresh row of the latent from each neighbour (the original has the whole latent everywhere).

    GroupNorm: the whole image's stale moments plus the change of the own patch, mean = mean_j m^_j + a (m_i - m^_i) and the
    same for E[x^2], where a, the `correction`, is 1: the other patches are taken to have changed as this one did. Where the
    resulting variance is negative the own variance is used (arXiv 2402.19481, section 4.2). Two deviations from the
    original's code, both towards exactness: moments are float32, and the variance is the population's (torch's GroupNorm)
    instead of being scaled by n/(n-1) with the local element count.
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
        self._moments: dict[str, Float[Array, "n b g 2"]] | None = None
        self._last_kv: Float[Array, "b h w c2"] | None = None  # of the layer before

    def halo(self, name, x, above, below):
        x = self._without_padding(x)
        own = self._publish_edges(name, x, above, below)
        return with_neighbours(x, {end: self._previous(name + end) for end in own}, self.axis)

    def kv(self, name, kv):
        before, self._last_kv = self._last_kv, kv
        own, compression = self._local_kv(kv), self.publishing.compress
        stale = tuple(self._read(each) for each in ((name, name + ENDS) if compression else (name,)))
        restore = partial(decode, compression=compression) if compression else lambda tokens: tokens
        self._check(name, jax.eval_shape(restore, *stale), own)
        padded = self._in_image(kv) is not None  # else attention does not depend on the order
        own, *everyone = gather_kv(own, stale, restore, self.axis, in_order=padded, after=before)
        self._publish(KV, name, own)
        keys, values = (self._image_kv(each, kv) for each in everyone)
        return keys, values

    def moments(self, name, x, size):
        own = self._publish(MOMENTS, name, self._own(x, size))
        stale = self._previous(name)
        (own_mean, own_variance), (old_mean, old_variance) = split_moments(own), split_moments(stale)
        stale_mean, stale_variance = split_moments(pool_moments(self._stale_moments(name), self._shares(x)))
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

    def _extrapolate(self, kind, name, value):
        mean = self._read(name + MEAN)
        step = (1 - EMA_DECAY) * (value - mean)
        predicted = value + jnp.asarray(self.step_ratio, value.dtype) * step
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
            together = all_patches(own, self.axis)
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


class StaleGN(Displaced):
    """stale_gn: the moments are the others' previous ones beside the own fresh ones, a correction by the own share."""

    def correction(self, x):
        return jnp.asarray(self._shares(x))[lax.axis_index(self.axis)]


class DampedAsyncGN(Displaced):
    """damped_async_gn: half of the correction.

    Where a patch changes otherwise than the rest, the whole correction overshoots, and a variance near zero makes GroupNorm
    blow up; a half does not (figures in docs/staleness.md).
    """

    def correction(self, x):
        return 0.5


class SyncGN(Displaced):
    """sync_gn: a blocking exchange of the moments at every step; halo and tokens are displaced."""

    KEEPS = frozenset({HALO, KV})
    moments = Synchronous.moments


class AsyncTokens(SyncGN):
    """async_tokens: blocking exchanges of what is small, moments and boundary rows; only tokens are displaced."""

    KEEPS = frozenset({KV})
    halo = Synchronous.halo


class SeparateGN(Displaced):
    """separate_gn: every patch is normalised by itself; halo and tokens are displaced."""

    KEEPS = frozenset({HALO, KV})

    def moments(self, name, x, size):
        return self._publish(MOMENTS, name, self._own(x, size))


class NoSync(SeparateGN):
    """no_sync: what the others published at the last step of the warm-up, for ever; own moments.

    The original's numbers, not its traffic: the same values are sent again at every step.
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
        self, stale: Stale, axis: Axis = PATCH, bands: Bands | None = None, step_ratio: Float[Array, ""] | float = 1.0
    ) -> Displaced:
        return self.kind(stale, axis, bands, self.publishing, step_ratio)

    @property
    def publishing(self) -> Publishing:
        return Publishing(self.kind.KEEPS, self.extrapolate, self.compress)


def strategy_of(config: DistriConfig, patches: int) -> Strategy | None:
    """What follows the warm-up; None where every step is synchronous, as with one patch, which has nobody to wait for."""
    if config.sync_mode not in STRATEGIES or patches == 1:
        return None
    return Strategy(STRATEGIES[config.sync_mode], config.extrapolate, config.compress)


def _is_moments(name: str, leaf: Array) -> bool:
    """Whether a stale value is moments, and no running mean of them; others have another shape or dtype (`Stale`)."""
    return leaf.ndim == 3 and leaf.shape[-1] == 2 and leaf.dtype == jnp.float32 and not name.endswith((MEAN, ENDS))
