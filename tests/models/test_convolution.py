"""Convolutions against torch, computed in every way."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec as P
from oracle import nhwc, port, relative_error

from distrijax.models import convolution
from distrijax.models.layers import Conv
from distrijax.parallel.exchange import Synchronous, WholeImage
from distrijax.parallel.mesh import PATCH, MeshPlan
from distrijax.parallel.platform import tracing_for
from distrijax.parallel.programs import options_for

EXACT = 1e-5


def jitted():
    """A new jit each time, for the limits are read while it traces."""
    return jax.jit(lambda module, x: module(x, WholeImage()))


@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (7, 5)], ids=["even", "odd"])
@pytest.mark.parametrize(("kernel", "stride", "trailing"), [(3, 1, False), (1, 1, False), (3, 2, False), (3, 2, True)])
def test_convolution_equals_torch(kernel, stride, trailing, rows, columns):
    source = torch.nn.Conv2d(4, 6, kernel, stride, padding=0 if trailing else kernel // 2)
    ours = port(Conv(4, 6, kernel, stride=stride, trailing=trailing, rngs=nnx.Rngs(0)), source)
    x = torch.randn(2, 4, rows, columns)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1)) if trailing else x
    assert relative_error(jitted()(ours, nhwc(x)), nhwc(source(padded))) < EXACT


@pytest.mark.parametrize(("kernel", "stride", "trailing"), [(3, 1, False), (1, 1, False), (3, 2, False), (3, 2, True)])
def test_large_kernels_over_few_pixels_are_products_on_cpus_and_equal_torch(kernel, stride, trailing, monkeypatch):
    monkeypatch.setattr(convolution, "LARGE_KERNEL", 0)
    source = torch.nn.Conv2d(4, 1024, kernel, stride, padding=0 if trailing else kernel // 2)
    ours = port(Conv(4, 1024, kernel, stride=stride, trailing=trailing, rngs=nnx.Rngs(0)), source)
    x = torch.randn(2, 4, 7, 5)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1)) if trailing else x
    traced = jitted().trace(ours, nhwc(x))
    for platform, convolutions in (("cpu", 0), ("cuda", 1)):
        lowered = traced.lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("stablehlo.convolution(") == convolutions
    assert relative_error(traced.lower().compile()(ours, nhwc(x)), nhwc(source(padded))) < EXACT


def test_convolutions_and_products_on_cpus_are_not_ynnpacks():
    """Its convolutions of few channels, which Winograd's sums leave to XLA, run on one core."""
    conv, x = Conv(32, 32, rngs=nnx.Rngs(0)), np.ones((2, 32, 32, 32), np.float32)
    lowered = jax.jit(lambda conv, x: conv(x, WholeImage()) @ x[0, 0]).lower(conv, x)
    assert "__ynn_fusion" not in lowered.compile(compiler_options=options_for("cpu")).as_text()


@pytest.fixture
def winograd(monkeypatch):
    """Winograd's products however small."""
    for limit in ("WINOGRAD_CHANNELS", "WINOGRAD_WORK"):
        monkeypatch.setattr(convolution, limit, 0)


@pytest.mark.parametrize(
    ("shape", "dtype", "products"),
    [
        ((2, 8, 6, 4), np.float32, 16),
        ((2, 7, 6, 4), np.float32, 0),
        ((2, 8, 5, 4), np.float32, 0),
        ((2, 8, 6, 4), jax.numpy.bfloat16, 0),
        ((1, 16, 34, 4), np.float32, 0),
    ],
    ids=["even", "odd rows", "odd columns", "16 bits", "more pixels than 128 a channel"],
)
def test_winograds_products_on_cpus_equal_torch(shape, dtype, products, winograd):
    source = torch.nn.Conv2d(4, 6, 3, padding=1)
    ours = port(Conv(4, 6, rngs=nnx.Rngs(0)), source)
    x = torch.randn(shape[0], shape[3], *shape[1:3])
    traced = jitted().trace(ours, nhwc(x).astype(dtype))
    for platform, expected in (("cpu", products), ("cuda", 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.dot_general ") == expected
        assert text.count("stablehlo.convolution(") == (not expected)
    got = traced.lower().compile()(ours, nhwc(x).astype(dtype)).astype(np.float32)
    assert relative_error(got, nhwc(source(x))) < (EXACT if dtype == np.float32 else 0.03)


def test_winograds_products_are_for_large_convolutions_of_stride_one():
    def products(pixels: int, channels: int, **settings) -> bool:
        module = Conv(channels, channels, rngs=nnx.Rngs(0), **settings)
        x = jax.ShapeDtypeStruct((1, pixels, pixels, channels), np.float32)
        text = jitted().trace(module, x).lower().as_text()
        return "dot_general" in text

    assert products(88, 64)
    assert not products(56, 64) and not products(88, 64, stride=2)


def test_winograds_derivatives_are_torchs(winograd):
    source = torch.nn.Conv2d(4, 6, 3, padding=1)
    ours = port(Conv(4, 6, rngs=nnx.Rngs(0)), source)
    x = torch.randn(2, 4, 8, 6).requires_grad_()
    source(x).square().sum().backward()
    loss = jax.jit(jax.grad(lambda module, x: (module(x, WholeImage()) ** 2).sum(), (0, 1)))
    module, pixels = loss(ours, nhwc(x.detach()))
    assert relative_error(pixels, nhwc(x.grad)) < EXACT
    assert relative_error(module.kernel.get_value(), source.weight.grad.permute(2, 3, 1, 0)) < EXACT


@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (7, 5)], ids=["even", "odd"])
@pytest.mark.parametrize(("kernel", "stride", "trailing"), [(3, 1, False), (1, 1, False), (3, 2, False), (3, 2, True)])
def test_on_tpus_a_product_for_each_place_of_the_kernel_equals_torch(kernel, stride, trailing, rows, columns):
    """TPUs are not here, but what is done for them can be done by CPUs."""
    source = torch.nn.Conv2d(4, 6, kernel, stride, padding=0 if trailing else kernel // 2)
    ours = port(Conv(4, 6, kernel, stride=stride, trailing=trailing, rngs=nnx.Rngs(0)), source)
    x = torch.randn(2, 4, rows, columns)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1)) if trailing else x
    assert _products_on_tpus(ours, nhwc(x)) == kernel**2
    with tracing_for("tpu"):
        assert relative_error(jitted()(ours, nhwc(x)), nhwc(source(padded))) < EXACT


def test_on_tpus_large_images_are_convolved_by_xla():
    module = Conv(320, 320, rngs=nnx.Rngs(0))
    shapes = [jax.ShapeDtypeStruct((2, rows, 480, 320), np.float32) for rows in (30, 60)]
    assert [_products_on_tpus(module, shape) for shape in shapes] == [9, 0]


def _products_on_tpus(module, x) -> int:
    text = jitted().trace(module, x).lower(lowering_platforms=("tpu",)).as_text()
    products, convolutions = text.count("stablehlo.dot_general "), text.count("stablehlo.convolution(")
    assert bool(products) != bool(convolutions)
    return products


@pytest.mark.parametrize("way", ["_im2col", "_winograd"])
def test_products_on_eight_bands_equal_torch(way, winograd, monkeypatch):
    monkeypatch.setattr(convolution, "LARGE_KERNEL", 0)
    used = []
    original = getattr(convolution, way)
    monkeypatch.setattr(convolution, way, lambda *args, **settings: used.append(way) or original(*args, **settings))
    features, rows, columns = (1024, 8, 5) if way == "_im2col" else (6, 16, 6)
    source = torch.nn.Conv2d(4, features, 3, padding=1)
    ours = port(Conv(4, features, rngs=nnx.Rngs(0)), source)
    mesh = MeshPlan(1, 1, 8).build(jax.devices()[:8])
    cut = P(None, PATCH)
    mapped = jax.shard_map(lambda x: ours(x, Synchronous()), mesh=mesh, in_specs=cut, out_specs=cut)
    x = torch.randn(2, 4, rows, columns)
    assert relative_error(jax.jit(mapped)(nhwc(x)), nhwc(source(x))) < EXACT
    assert used
