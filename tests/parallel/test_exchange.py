"""Each question of an exchange, on virtual devices, against numpy on the whole image."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import refuses
from jax.sharding import PartitionSpec as P

from distrijax.config import Compression, SyncMode
from distrijax.parallel.bands import Bands
from distrijax.parallel.collectives import FIRST, LAST
from distrijax.parallel.displaced import (
    STRATEGIES,
    AsyncTokens,
    DampedAsyncGN,
    Displaced,
    NoSync,
    SeparateGN,
    StaleGN,
    Strategy,
    SyncGN,
)
from distrijax.parallel.exchange import (
    CHANNEL_RANGE,
    HALO,
    KV,
    MOMENTS,
    Stale,
    Synchronous,
    TensorParallel,
    WholeImage,
    ema,
)
from distrijax.parallel.mesh import CFG, PATCH, MeshPlan
from distrijax.parallel.platform import tracing_for

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
def test_keys_and_values_are_those_of_the_whole_image_in_order(plan, axis):
    n, kv = plan.devices, normal(2, ROWS, 3, 6)
    (got,) = on_bands(plan, axis, lambda kv: (side_by_side(Synchronous(axis).kv("a", kv)),), kv)
    for band in bands(got, n):
        np.testing.assert_array_equal(band, kv.reshape(2, -1, 6))


SIZE = 2
"""Channels of a group."""


def moments_of(x: np.ndarray) -> np.ndarray:
    """Mean and variance of [b, rows, columns, channels] for each group, [b, g, 2], in float64."""
    groups = x.astype(np.float64).reshape(*x.shape[:3], -1, SIZE)
    return np.stack([groups.mean((1, 2, 4)), groups.var((1, 2, 4))], -1)


@AXES
@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["centred", "far from zero"])
def test_moments_are_those_of_the_whole_image(plan, axis, offset):
    x = normal(2, ROWS, 3, 4, offset=offset)
    (got,) = on_bands(plan, axis, lambda x: (Synchronous(axis).moments("a", x, SIZE)[:, None],), x)
    wanted = moments_of(x)
    for i in range(plan.devices):
        np.testing.assert_allclose(got[:, i, :, 0], wanted[..., 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[:, i, :, 1], wanted[..., 1], rtol=1e-3 if offset else 1e-5)


UNEVEN = pytest.mark.parametrize(
    ("rows", "n", "levels"), [(13, 4, 1), (13, 4, 3), (5, 4, 3), (9, 8, 1)], ids=lambda value: str(value)
)


def on_uneven_bands(rows: int, n: int, levels: int, function, width: int = 3, channels: int = 4):
    """Every band's results where the image has so many rows, and the image; its padding is NaN, which must not spread."""
    cut = Bands.among(rows, n, levels=levels)
    x = normal(2, rows, width, channels, offset=0.5)
    filled = np.pad(x, ((0, 0), (0, n * cut.rows_per_device - rows), (0, 0), (0, 0)), constant_values=np.nan)
    assert filled.shape[1] > rows
    return x, cut, on_bands(MeshPlan(1, 1, n), PATCH, lambda x: function(Synchronous(bands=cut), x), filled, out=3)


@UNEVEN
def test_padding_is_zeros_to_a_convolution_and_no_part_of_keys_values_and_moments(rows, n, levels):
    x, cut, results = on_uneven_bands(rows, n, levels, lambda exchange, x: ask_everything(exchange, x)[:3])
    halo, pairs, moments = (bands(result, n) for result in results)
    below = n * cut.rows_per_device - rows + 1
    padded = np.pad(x, ((0, 0), (1, below), (0, 0), (0, 0)))
    for i in range(n):
        np.testing.assert_array_equal(halo[i], padded[:, i * cut.rows_per_device : (i + 1) * cut.rows_per_device + 2])
        np.testing.assert_array_equal(pairs[i], x.reshape(2, -1, 4))
        np.testing.assert_allclose(moments[i][:, 0], moments_of(x), rtol=1e-5, atol=1e-6)


@UNEVEN
@pytest.mark.parametrize("mode", STRATEGIES, ids=str)
def test_displaced_bands_of_uneven_height_with_what_was_just_published_equal_synchronous_ones(mode, rows, n, levels):
    kind = STRATEGIES[mode]

    def again(exchange, x):
        *_, stale = ask_everything(Synchronous(exchange.axis, exchange.bands, Strategy(kind).publishing), x)
        return ask_everything(kind(stale, PATCH, exchange.bands), x)[:3]

    x, cut, results = on_uneven_bands(rows, n, levels, again)
    halo, pairs, moments = (bands(result, n) for result in results)
    padded = np.pad(x, ((0, 0), (1, n * cut.rows_per_device - rows + 1), (0, 0), (0, 0)))
    for i in range(n):
        np.testing.assert_array_equal(halo[i], padded[:, i * cut.rows_per_device : (i + 1) * cut.rows_per_device + 2])
        np.testing.assert_array_equal(pairs[i], x.reshape(2, -1, 4))
        own = x[:, i * cut.rows_per_device : (i + 1) * cut.rows_per_device]
        if not issubclass(kind, SeparateGN):
            np.testing.assert_allclose(moments[i][:, 0], moments_of(x), rtol=1e-5, atol=1e-6)
        elif own.size:
            np.testing.assert_allclose(moments[i][:, 0], moments_of(own), rtol=1e-5, atol=1e-6)


@UNEVEN
def test_padding_is_no_part_of_the_range_of_compressed_keys_and_values(rows, n, levels):
    strategy = Strategy(Displaced, compress=Compression.INT8)

    def again(exchange, x):
        *_, stale = ask_everything(Synchronous(exchange.axis, exchange.bands, strategy.publishing), x)
        return ask_everything(strategy(stale, PATCH, exchange.bands), x)[:3]

    x, _, (_, pairs, _) = on_uneven_bands(rows, n, levels, again)
    for each in bands(pairs, n):
        assert np.abs(each - x.reshape(2, -1, 4)).max() < np.ptp(x) / 255


@pytest.fixture
def as_on_tpus():
    """TPUs are not here, but what is done for them can be done by CPUs."""
    with tracing_for("tpu"):
        yield


@UNEVEN
def test_bands_of_uneven_height_are_alike_on_tpus(as_on_tpus, rows, n, levels):
    mode = SyncMode.CORRECTED_ASYNC_GN
    test_displaced_bands_of_uneven_height_with_what_was_just_published_equal_synchronous_ones(mode, rows, n, levels)


@AXES
def test_on_tpus_keys_and_values_begin_with_the_own_ones(as_on_tpus, plan, axis):
    """Those of several layers, of which each but the first waits for the layer before."""
    names, n = ("first", "second", "third"), plan.devices

    def local(previous, present):
        earlier = Synchronous(axis)
        for name in names:
            earlier.kv(name, previous)
        later = Displaced(earlier.finish(), axis)
        return tuple(side_by_side(later.kv(name, present)) for name in names)

    for layer in on_bands(plan, axis, local, PREVIOUS, PRESENT, out=len(names)):
        for own, got in enumerate(bands(layer, n)):
            others = [bands(PREVIOUS, n)[(own + far) % n] for far in range(1, n)]
            np.testing.assert_array_equal(got, np.concatenate([bands(PRESENT, n)[own], *others], 1).reshape(2, -1, 4))


def test_one_device_needs_nothing():
    x, whole = jnp.asarray(normal(1, 4, 3, 2)), WholeImage()
    np.testing.assert_array_equal(whole.halo("a", x, 1, 0), np.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))))
    np.testing.assert_array_equal(side_by_side(whole.kv("b", x)), x.reshape(1, 12, 2))
    np.testing.assert_allclose(whole.moments("c", x, SIZE), moments_of(np.asarray(x)), rtol=1e-5)
    assert whole.finish() == {}


def test_each_device_has_its_part_of_the_channels_and_sums_are_everyones():
    """Five channels in parts of two: the last device has one, and a zero in place of the sixth."""
    x = normal(1, 3, 2, 5)

    def local(x):
        exchange = TensorParallel(PATCH)
        part = exchange.channels(x, 2)
        assert exchange.channels(part, 2) is part
        return part, exchange.whole_sum(jnp.sum(part))

    mesh = MeshPlan(1, 1, 3).build(jax.devices()[:3])
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=(P(None, None, None, PATCH), P()))
    parts, total = jax.jit(mapped)(x)
    np.testing.assert_array_equal(parts, np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1))))
    np.testing.assert_allclose(total, x.sum(), rtol=1e-5)


def side_by_side(keys_values):
    """Keys and values as they were asked for."""
    return jnp.concatenate(keys_values, -1)


def ask_everything(exchange, x):
    """All three questions, as a layer's results that have rows, and what was published."""
    halo = exchange.halo("halo", x, 1, 1)
    pairs = side_by_side(exchange.kv("attention", x))
    moments = exchange.moments("moments", x, SIZE)[:, None]
    return halo, pairs, moments, exchange.finish()


EVERY_KIND = pytest.mark.parametrize("kind", STRATEGIES.values(), ids=[str(mode) for mode in STRATEGIES])


@AXES
@EVERY_KIND
def test_displaced_with_what_was_just_published_equals_synchronous(plan, axis, kind):
    def both(x):
        *synchronous, stale = ask_everything(Synchronous(axis, publishing=Strategy(kind).publishing), x)
        *displaced, fresh = ask_everything(kind(stale, axis), x)
        same = jnp.all(jnp.stack([jnp.all(stale[name] == fresh[name]) for name in stale])).reshape(1, 1)
        if issubclass(kind, SeparateGN):
            synchronous[2] = WholeImage().moments("own", x, SIZE)[:, None]
        return *synchronous, *displaced, same

    *results, same = on_bands(plan, axis, both, normal(2, ROWS, 3, 4), out=7)
    assert same.all()
    for synchronous, displaced in zip(results[:3], results[3:], strict=True):
        np.testing.assert_allclose(displaced, synchronous, rtol=1e-6, atol=1e-6)


PREVIOUS, PRESENT = normal(2, ROWS, 3, 4), normal(2, ROWS, 3, 4, seed=1, offset=0.3)


@functools.cache
def displaced(kind: type[Displaced]) -> list[np.ndarray]:
    """Answers to four bands that see the present image and know each other's previous one."""

    def local(previous, present):
        *_, stale = ask_everything(Synchronous(publishing=Strategy(kind).publishing), previous)
        return ask_everything(kind(stale), present)[:3]

    return on_bands(MeshPlan(1, 1, 4), PATCH, local, PREVIOUS, PRESENT, out=3)


@EVERY_KIND
def test_displaced_halo_is_the_neighbours_previous_rows_around_fresh_ones(kind):
    """But for the kind whose rows are all fresh."""
    padded = np.pad(PRESENT if kind is AsyncTokens else PREVIOUS, ((0, 0), (1, 1), (0, 0), (0, 0)))
    for i, band in enumerate(bands(displaced(kind)[0], 4)):
        np.testing.assert_array_equal(band[:, 1:-1], PRESENT[:, 4 * i : 4 * i + 4])
        np.testing.assert_array_equal(band[:, [0, -1]], padded[:, [4 * i, 4 * i + 5]])


@EVERY_KIND
def test_displaced_keys_and_values_are_previous_ones_with_the_own_part_fresh(kind):
    for i, got in enumerate(bands(displaced(kind)[1], 4)):
        wanted = PREVIOUS.copy()
        wanted[:, 4 * i : 4 * i + 4] = PRESENT[:, 4 * i : 4 * i + 4]
        np.testing.assert_array_equal(got, wanted.reshape(2, -1, 4))


ROWS_SENT = {(HALO, "halo" + LAST), (HALO, "halo" + FIRST)}
KEPT = {
    SyncGN: {*ROWS_SENT, (KV, "attention")},
    AsyncTokens: {(KV, "attention")},
    SeparateGN: {*ROWS_SENT, (KV, "attention")},
    NoSync: {*ROWS_SENT, (KV, "attention")},
}


@EVERY_KIND
def test_what_the_next_step_reads_is_kept_and_only_no_sync_never_publishes_again(kind):
    def local(previous, present):
        *_, stale = ask_everything(Synchronous(publishing=Strategy(kind).publishing), previous)
        *_, kept = ask_everything(kind(stale), present)
        *_, fresh = ask_everything(Synchronous(publishing=Strategy(kind).publishing), present)
        assert kept.keys() == stale.keys() == KEPT.get(kind, {*ROWS_SENT, (KV, "attention"), (MOMENTS, "moments")})
        wanted = stale if kind is NoSync else fresh
        return (jnp.all(jnp.stack([jnp.all(kept[name] == wanted[name]) for name in kept])).reshape(1, 1),)

    assert on_bands(MeshPlan(1, 1, 4), PATCH, local, PREVIOUS, PRESENT)[0].all()


@pytest.mark.parametrize("on_tpus", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("compression", "levels", "packed"), [(Compression.INT8, 256, 4), (Compression.INT4, 16, 2)])
def test_compressed_keys_and_values_are_the_others_previous_ones_quantized(
    request, compression, levels, packed, dtype, on_tpus
):
    """Channels of very different sizes, and one of zeros: each has levels of its own, in each patch."""
    if on_tpus:
        request.getfixturevalue("as_on_tpus")
    sizes = np.array([100.0, 1.0, 1e-3, 0.0], np.float32)
    strategy = Strategy(Displaced, compress=compression)

    def local(previous, present):
        *_, stale = ask_everything(Synchronous(publishing=strategy.publishing), previous)
        assert (stale[KV, "attention"].shape, stale[KV, "attention"].dtype) == ((2, 12, packed), jnp.uint8)
        assert (stale[CHANNEL_RANGE, "attention"].shape, stale[CHANNEL_RANGE, "attention"].dtype) == ((2, 2, 4), dtype)
        _, pairs, _, fresh = ask_everything(strategy(stale), present)
        assert fresh.keys() == stale.keys()
        return (pairs.astype(jnp.float32),)

    previous, present = (jnp.asarray(x * sizes, dtype) for x in (PREVIOUS, PRESENT))
    (got,) = on_bands(MeshPlan(1, 1, 4), PATCH, local, previous, present)
    parts = [np.float32(band).reshape(2, -1, 4) for band in bands(np.asarray(previous), 4)]
    fresh = [np.float32(band).reshape(2, -1, 4) for band in bands(np.asarray(present), 4)]
    for i, pairs in enumerate(bands(got, 4)):
        pairs = np.roll(pairs, 12 * i, axis=1) if on_tpus else pairs
        for j, part in enumerate(np.split(pairs, 4, axis=1)):
            if i == j:
                np.testing.assert_array_equal(part, fresh[i])
                continue
            half = np.ptp(parts[j], axis=1, keepdims=True) / (levels - 1) / 2
            slack = (1e-6 if dtype == jnp.float32 else 2.0**-8) * np.abs(parts[j])
            assert (np.abs(part - parts[j]) <= 1.001 * half + slack).all()
            assert len(np.unique(part[0, :, 0])) > 5


def corrected(previous: np.ndarray, present: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paper's formula for band i as it is written, in float64: mean, variance, and the band's own variance.

    previous, present: [n, b, g, 2], each band's mean and mean of squares.
    """
    mean, squares = np.moveaxis(previous.mean(0) + (present[i] - previous[i]), -1, 0)
    return mean, squares - mean**2, present[i, ..., 1] - present[i, ..., 0] ** 2


def raw_moments(x: np.ndarray) -> np.ndarray:
    means, variances = np.moveaxis(np.stack([moments_of(band) for band in bands(x, 4)]), -1, 0)
    return np.stack([means, variances + means**2], -1)


@EVERY_KIND
def test_displaced_moments_follow_the_formula_of_their_mode(kind):
    """The table of the modes, in means and means of squares; i is the patch that asks."""
    previous, present = raw_moments(PREVIOUS), raw_moments(PRESENT)
    for i, got in enumerate(bands(displaced(kind)[2], 4)):
        mixed = previous.copy()
        mixed[i] = present[i]
        mean, squares = np.moveaxis(
            {
                Displaced: previous.mean(0) + (present[i] - previous[i]),
                DampedAsyncGN: previous.mean(0) + 0.5 * (present[i] - previous[i]),
                StaleGN: mixed.mean(0),
                SyncGN: present.mean(0),
                AsyncTokens: present.mean(0),
                SeparateGN: present[i],
                NoSync: present[i],
            }[kind],
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
        exchange.moments("a", previous, SIZE)
        return (Displaced(exchange.finish()).moments("a", present, SIZE)[:, None],)

    (moments,) = on_bands(MeshPlan(1, 1, 4), PATCH, local, previous, present)
    fell_back = []
    for i, got in enumerate(bands(moments, 4)):
        _, variance, own = corrected(raw_moments(previous), raw_moments(present), i)
        np.testing.assert_allclose(got[:, 0, :, 1], np.where(variance < 0, own, variance), rtol=1e-5)
        fell_back.append(bool((variance < 0).all()))
    assert fell_back == [True, False, False, False]


def stale_kv(shape=(1, 4, 6), dtype=jnp.float32) -> Stale:
    return {(KV, "a"): jnp.zeros(shape, dtype)}


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda kv: twice(kv), KeyError, ["a", "twice"]),
        (lambda kv: Displaced({}).kv("a", kv), KeyError, ["'a'", "stale"]),
        (lambda kv: Displaced(stale_kv()).finish(), KeyError, ["kv", "a", "never", "stale"]),
        (lambda kv: Displaced({(HALO, "a"): jnp.zeros((1, 4, 6))}).kv("a", kv), KeyError, ["kv", "'a'"]),
        (lambda kv: Displaced({(ema(KV), "a"): jnp.zeros((1, 4, 6))}).kv("a", kv), KeyError, ["kv", "'a'"]),
        (lambda kv: Displaced(stale_kv((1, 2, 6))).kv("a", kv), ValueError, ["a", "float32[1, 2, 6]"]),
        (lambda kv: Displaced(stale_kv(dtype=jnp.bfloat16)).kv("a", kv), ValueError, ["a", "bfloat16"]),
    ],
    ids=["name used twice", "missing key", "left-over key", "rows", "an average", "another shape", "another dtype"],
)
def test_stale_state_of_another_model_is_refused(call, error, told):
    mesh = MeshPlan(1, 1, 2).build(jax.devices()[:2])
    with refuses(*told, error=error):
        jax.eval_shape(
            jax.shard_map(call, mesh=mesh, in_specs=P(None, PATCH), out_specs=P(PATCH), check_vma=False),
            jnp.zeros((1, 4, 2, 6)),
        )


def twice(kv):
    exchange = Synchronous()
    return jax.tree.map(jnp.add, exchange.kv("a", kv), exchange.kv("a", kv))


def test_extrapolation_continues_from_the_exponential_moving_average_in_the_ratio_of_the_steps():
    """Three steps, the first synchronous; what is sent after the second is what the third sees of the others."""
    strategy, step_ratio = Strategy(Displaced, extrapolate=True), 1.5
    third = normal(2, ROWS, 3, 4, seed=2)

    def local(first, second, third):
        *_, stale = ask_everything(Synchronous(publishing=strategy.publishing), first)
        assert stale.keys() == {
            (each, name)
            for kind, name in (*ROWS_SENT, (KV, "attention"), (MOMENTS, "moments"))
            for each in (kind, ema(kind))
        }
        *_, stale = ask_everything(strategy(stale, step_ratio=jnp.float32(step_ratio)), second)
        halo, pairs, _, stale = ask_everything(strategy(stale, step_ratio=jnp.float32(1.0)), third)
        return halo, pairs, stale[ema(KV), "attention"], stale[MOMENTS, "moments"][:, None, :, 1]

    halo, pairs, mean, variance = on_bands(MeshPlan(1, 1, 4), PATCH, local, PREVIOUS, PRESENT, third, out=4)
    sent = PRESENT + step_ratio / 3 * (PRESENT - PREVIOUS)
    for i in range(4):
        own = slice(4 * i, 4 * i + 4)
        wanted = np.pad(sent, ((0, 0), (1, 1), (0, 0), (0, 0)))[:, 4 * i : 4 * i + 6]
        wanted[:, 1:-1] = third[:, own]
        np.testing.assert_allclose(bands(halo, 4)[i], wanted, rtol=1e-5, atol=1e-6)
        wanted = sent.copy()
        wanted[:, own] = third[:, own]
        np.testing.assert_allclose(bands(pairs, 4)[i], wanted.reshape(2, -1, 4), rtol=1e-5, atol=1e-6)
    after_two = 2 / 3 * PREVIOUS + 1 / 3 * PRESENT
    np.testing.assert_allclose(mean, (2 / 3 * after_two + 1 / 3 * third).reshape(2, -1, 4), rtol=1e-5, atol=1e-6)
    assert (variance >= 0).all()


def test_a_predicted_variance_is_never_negative():
    """A band that was wide and is nearly flat now."""
    strategy = Strategy(Displaced, extrapolate=True)

    def local(x):
        exchange = Synchronous(publishing=strategy.publishing)
        exchange.moments("a", x, SIZE)
        following = strategy(exchange.finish(), step_ratio=2.0)
        following.moments("a", 0.1 * x, SIZE)
        return (following.finish()[MOMENTS, "a"][:, None],)

    (published,) = on_bands(MeshPlan(1, 1, 2), PATCH, local, PRESENT)
    assert (published[..., 1] == 0).all()
