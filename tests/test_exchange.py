"""Each question of an exchange, on virtual devices, against numpy on the whole image."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distrijax.config import SyncMode
from distrijax.exchange import (
    STRATEGIES,
    Displaced,
    Frozen,
    OwnMoments,
    Synchronous,
    WholeImage,
    whole_image_std,
)
from distrijax.mesh import CFG, PATCH, MeshPlan

AXES = pytest.mark.parametrize(
    ("plan", "axis"),
    [
        (MeshPlan(1, 1, 1), PATCH),
        (MeshPlan(1, 1, 4), PATCH),
        (MeshPlan(1, 1, 8), PATCH),
        (MeshPlan(1, 2, 4), (PATCH, CFG)),
    ],
    ids=["one band", "four bands", "eight bands", "eight bands over two axes"],
)
ROWS = 16


def normal(*shape: int, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    return offset + np.random.default_rng(seed).standard_normal(shape, np.float32)


def on_bands(plan: MeshPlan, axis, function, *arrays, out: int = 1):
    """`function(*bands)` on every band of the arrays' second axis; results are put together along that axis."""
    mesh = plan.build(jax.devices()[: plan.devices])
    cut = P(None, axis)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(cut,) * len(arrays), out_specs=(cut,) * out)
    results = jax.jit(mapped)(*arrays)
    return [np.asarray(result) for result in results]


def bands(x: np.ndarray, n: int) -> list[np.ndarray]:
    return np.split(x, n, axis=1)


@AXES
@pytest.mark.parametrize(("above", "below"), [(1, 1), (1, 0), (0, 1), (2, 1)])
def test_halo_is_the_rows_of_the_whole_image(plan, axis, above, below):
    n, x = plan.devices, normal(2, ROWS, 3, 2)
    (got,) = on_bands(plan, axis, lambda x: (Synchronous(axis).halo("a", x, above, below),), x)
    padded = np.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))
    rows = ROWS // n
    for i, band in enumerate(bands(got, n)):
        np.testing.assert_array_equal(band, padded[:, i * rows : (i + 1) * rows + above + below])


@AXES
def test_tokens_are_those_of_the_whole_image_in_order(plan, axis):
    n, kv = plan.devices, normal(2, ROWS, 6)
    (got,) = on_bands(plan, axis, lambda kv: (Synchronous(axis).tokens("a", kv),), kv)
    for band in bands(got, n):
        np.testing.assert_array_equal(band, kv)


def moments_of(x: jax.Array) -> jax.Array:
    """Mean and variance of [b, rows, g, k] for each group g."""
    mean = jnp.mean(x, (1, 3))
    return jnp.stack([mean, jnp.mean(jnp.square(x - mean[:, None, :, None]), (1, 3))], -1)


@AXES
@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["centred", "far from zero"])
def test_moments_are_those_of_the_whole_image(plan, axis, offset):
    x = normal(2, ROWS, 3, 5, offset=offset)
    (got,) = on_bands(plan, axis, lambda x: (Synchronous(axis).moments("a", moments_of(x))[:, None],), x)
    exact = x.astype(np.float64)
    for i in range(plan.devices):
        np.testing.assert_allclose(got[:, i, :, 0], exact.mean((1, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[:, i, :, 1], exact.var((1, 3)), rtol=1e-3 if offset else 1e-5)


def test_one_device_needs_nothing():
    x, whole = jnp.asarray(normal(1, 4, 3, 2)), WholeImage()
    np.testing.assert_array_equal(whole.halo("a", x, 1, 0), np.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))))
    assert whole.tokens("b", x) is x
    assert whole.moments("c", x) is x
    assert whole.finish() == {}


def ask_everything(exchange, x):
    """All three questions, as a layer's results that have rows, and what was published."""
    halo = exchange.halo("halo", x, 1, 1)
    tokens = exchange.tokens("tokens", x.reshape(*x.shape[:2], -1))
    moments = exchange.moments("moments", moments_of(x))[:, None]
    return halo, tokens, moments, exchange.finish()


EVERY_STRATEGY = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=[str(mode) for mode in STRATEGIES])


@AXES
@EVERY_STRATEGY
def test_displaced_with_what_was_just_published_equals_synchronous(plan, axis, strategy):
    def both(x):
        *synchronous, stale = ask_everything(Synchronous(axis, keep_moments=strategy.KEEPS_MOMENTS), x)
        *displaced, fresh = ask_everything(strategy(stale, axis), x)
        same = jnp.all(jnp.stack([jnp.all(stale[name] == fresh[name]) for name in stale])).reshape(1, 1)
        if issubclass(strategy, OwnMoments):
            synchronous[2] = moments_of(x)[:, None]
        return *synchronous, *displaced, same

    *results, same = on_bands(plan, axis, both, normal(2, ROWS, 3, 4), out=7)
    assert same.all()
    for synchronous, displaced in zip(results[:3], results[3:], strict=True):
        np.testing.assert_allclose(displaced, synchronous, rtol=1e-6, atol=1e-6)


PREVIOUS, PRESENT = normal(2, ROWS, 3, 4), normal(2, ROWS, 3, 4, seed=1, offset=0.3)


@functools.cache
def displaced(strategy: type[Displaced]) -> list[np.ndarray]:
    """Answers to four bands that see the present image and know each other's previous one."""

    def local(previous, present):
        *_, stale = ask_everything(Synchronous(keep_moments=strategy.KEEPS_MOMENTS), previous)
        return ask_everything(strategy(stale), present)[:3]

    return on_bands(MeshPlan(1, 1, 4), PATCH, local, PREVIOUS, PRESENT, out=3)


@EVERY_STRATEGY
def test_displaced_halo_is_the_neighbours_previous_rows_around_fresh_ones(strategy):
    padded = np.pad(PREVIOUS, ((0, 0), (1, 1), (0, 0), (0, 0)))
    for i, band in enumerate(bands(displaced(strategy)[0], 4)):
        np.testing.assert_array_equal(band[:, 1:-1], PRESENT[:, 4 * i : 4 * i + 4])
        np.testing.assert_array_equal(band[:, [0, -1]], padded[:, [4 * i, 4 * i + 5]])


@EVERY_STRATEGY
def test_displaced_tokens_are_previous_ones_with_the_own_part_fresh(strategy):
    for i, got in enumerate(bands(displaced(strategy)[1], 4)):
        wanted = PREVIOUS.reshape(2, ROWS, -1).copy()
        wanted[:, 4 * i : 4 * i + 4] = PRESENT.reshape(2, ROWS, -1)[:, 4 * i : 4 * i + 4]
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_only_no_sync_never_publishes_again(strategy):
    def local(previous, present):
        *_, stale = ask_everything(Synchronous(keep_moments=strategy.KEEPS_MOMENTS), previous)
        *_, kept = ask_everything(strategy(stale), present)
        *_, fresh = ask_everything(Synchronous(keep_moments=strategy.KEEPS_MOMENTS), present)
        assert kept.keys() == stale.keys()
        assert ("moments" in kept) == strategy.KEEPS_MOMENTS
        wanted = stale if strategy is Frozen else fresh
        return (jnp.all(jnp.stack([jnp.all(kept[name] == wanted[name]) for name in kept])).reshape(1, 1),)

    assert on_bands(MeshPlan(1, 1, 4), PATCH, local, PREVIOUS, PRESENT)[0].all()


def corrected(previous: np.ndarray, present: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paper's formula for band i as it is written, in float64: mean, variance, and the band's own variance.

    previous, present: [n, b, g, 2], each band's mean and mean of squares.
    """
    mean, squares = np.moveaxis(previous.mean(0) + (present[i] - previous[i]), -1, 0)
    return mean, squares - mean**2, present[i, ..., 1] - present[i, ..., 0] ** 2


def raw_moments(x: np.ndarray) -> np.ndarray:
    parts = np.stack(bands(x.astype(np.float64), 4))
    return np.stack([parts.mean((2, 4)), (parts**2).mean((2, 4))], -1)


@EVERY_STRATEGY
def test_displaced_moments_are_the_papers(strategy):
    """The table of the modes, in means and means of squares; i is the patch that asks."""
    previous, present = raw_moments(PREVIOUS), raw_moments(PRESENT)
    for i, got in enumerate(bands(displaced(strategy)[2], 4)):
        mixed = previous.copy()
        mixed[i] = present[i]
        mean, squares = np.moveaxis(
            {
                SyncMode.CORRECTED_ASYNC_GN: previous.mean(0) + (present[i] - previous[i]),
                SyncMode.STALE_GN: mixed.mean(0),
                SyncMode.SYNC_GN: present.mean(0),
                SyncMode.SEPARATE_GN: present[i],
                SyncMode.NO_SYNC: present[i],
            }[next(mode for mode in STRATEGIES if STRATEGIES[mode] is strategy)],
            -1,
            0,
        )
        assert (squares > mean**2).all()
        np.testing.assert_allclose(got[:, 0, :, 0], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[:, 0, :, 1], squares - mean**2, rtol=1e-5, atol=1e-6)


def test_negative_variance_becomes_the_bands_own():
    """A band that was wide and is narrow now takes more away from the mean of squares than there is."""
    present = normal(1, ROWS, 1, 4)
    previous = present * np.repeat([5.0, 1.0, 1.0, 1.0], 4).astype(np.float32)[None, :, None, None]

    def local(previous, present):
        exchange = Synchronous()
        exchange.moments("a", moments_of(previous))
        return (Displaced(exchange.finish()).moments("a", moments_of(present))[:, None],)

    (moments,) = on_bands(MeshPlan(1, 1, 4), PATCH, local, previous, present)
    fell_back = []
    for i, got in enumerate(bands(moments, 4)):
        _, variance, own = corrected(raw_moments(previous), raw_moments(present), i)
        np.testing.assert_allclose(got[:, 0, :, 1], np.where(variance < 0, own, variance), rtol=1e-5)
        fell_back.append(bool((variance < 0).all()))
    assert fell_back == [True, False, False, False]


def test_standard_deviation_is_torchs_over_the_whole_image():
    x = normal(2, ROWS, 3, 4, offset=2.0)
    (got,) = on_bands(MeshPlan(1, 1, 4), PATCH, lambda x: (whole_image_std(x, PATCH) + 0 * x[:, :1, :1, :1],), x)
    np.testing.assert_allclose(
        got, np.broadcast_to(x.std((1, 2, 3), ddof=1)[:, None, None, None], got.shape), rtol=1e-5
    )


def stale_tokens(shape=(1, 4, 6), dtype=jnp.float32) -> dict[str, jax.Array]:
    return {"a": jnp.zeros(shape, dtype)}


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda kv: twice(kv), KeyError, "used twice"),
        (lambda kv: Displaced({}).tokens("a", kv), KeyError, "no stale state for 'a'"),
        (lambda kv: Displaced(stale_tokens()).finish(), KeyError, "stale state was never read: a"),
        (lambda kv: Displaced(stale_tokens((1, 2, 6))).tokens("a", kv), ValueError, r"float32\[1, 2, 6\]"),
        (lambda kv: Displaced(stale_tokens(dtype=jnp.bfloat16)).tokens("a", kv), ValueError, "bfloat16"),
    ],
    ids=["name used twice", "missing key", "left-over key", "another shape", "another dtype"],
)
def test_stale_state_of_another_model_is_refused(call, error, sentence):
    mesh = MeshPlan(1, 1, 2).build(jax.devices()[:2])
    with pytest.raises(error, match=sentence):
        jax.eval_shape(
            jax.shard_map(call, mesh=mesh, in_specs=P(None, PATCH), out_specs=P(PATCH), check_vma=False),
            jnp.zeros((1, 8, 6)),
        )


def twice(kv):
    exchange = Synchronous()
    return exchange.tokens("a", kv) + exchange.tokens("a", kv)
