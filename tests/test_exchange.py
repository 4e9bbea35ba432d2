"""Each question of an exchange, on virtual devices, against numpy on the whole image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distrijax.exchange import Displaced, Synchronous, WholeImage, whole_image_std
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


@AXES
def test_displaced_with_what_was_just_published_equals_synchronous(plan, axis):
    def both(x):
        *synchronous, stale = ask_everything(Synchronous(axis), x)
        *displaced, fresh = ask_everything(Displaced(stale, axis), x)
        same = jnp.all(jnp.stack([jnp.all(stale[name] == fresh[name]) for name in stale])).reshape(1, 1)
        return *synchronous, *displaced, same

    *results, same = on_bands(plan, axis, both, normal(2, ROWS, 3, 4), out=7)
    assert same.all()
    for synchronous, displaced in zip(results[:3], results[3:], strict=True):
        np.testing.assert_allclose(displaced, synchronous, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def displaced():
    """Four bands that know each other's previous image: (previous, present, answers)."""
    previous, present = normal(2, ROWS, 3, 4), normal(2, ROWS, 3, 4, seed=1, offset=0.3)

    def local(previous, present):
        *_, stale = ask_everything(Synchronous(), previous)
        return ask_everything(Displaced(stale), present)[:3]

    return previous, present, on_bands(MeshPlan(1, 1, 4), PATCH, local, previous, present, out=3)


def test_displaced_halo_is_the_neighbours_previous_rows_around_fresh_ones(displaced):
    previous, present, (halo, _, _) = displaced
    padded = np.pad(previous, ((0, 0), (1, 1), (0, 0), (0, 0)))
    for i, band in enumerate(bands(halo, 4)):
        np.testing.assert_array_equal(band[:, 1:-1], present[:, 4 * i : 4 * i + 4])
        np.testing.assert_array_equal(band[:, [0, -1]], padded[:, [4 * i, 4 * i + 5]])


def test_displaced_tokens_are_previous_ones_with_the_own_part_fresh(displaced):
    previous, present, (_, tokens, _) = displaced
    for i, got in enumerate(bands(tokens, 4)):
        wanted = previous.reshape(2, ROWS, -1).copy()
        wanted[:, 4 * i : 4 * i + 4] = present.reshape(2, ROWS, -1)[:, 4 * i : 4 * i + 4]
        np.testing.assert_array_equal(got, wanted)


def corrected(previous: np.ndarray, present: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paper's formula for band i as it is written, in float64: mean, variance, and the band's own variance.

    previous, present: [n, b, g, 2], each band's mean and mean of squares.
    """
    mean, squares = np.moveaxis(previous.mean(0) + (present[i] - previous[i]), -1, 0)
    return mean, squares - mean**2, present[i, ..., 1] - present[i, ..., 0] ** 2


def raw_moments(x: np.ndarray) -> np.ndarray:
    parts = np.stack(bands(x.astype(np.float64), 4))
    return np.stack([parts.mean((2, 4)), (parts**2).mean((2, 4))], -1)


def test_displaced_moments_are_the_papers(displaced):
    previous, present, (_, _, moments) = displaced
    for i, got in enumerate(bands(moments, 4)):
        mean, variance, _ = corrected(raw_moments(previous), raw_moments(present), i)
        assert (variance > 0).all()
        np.testing.assert_allclose(got[:, 0, :, 0], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[:, 0, :, 1], variance, rtol=1e-5, atol=1e-6)


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
