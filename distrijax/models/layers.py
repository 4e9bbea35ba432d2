"""The layers of the UNet, the VAE and the text encoders.

Parameters are named as in diffusers. Layers that look beyond their own rows ask the exchange and know no mesh axis;
they are told their own path in the model once, by `name_layers`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from distrijax.models.convolution import convolve
from distrijax.parallel.exchange import Exchange


class TPKind(enum.Enum):
    """Which channels of a layer tensor parallelism divides; names as in Megatron-LM (arXiv 1909.08053)."""

    COLUMN = "each device computes some of the output channels"
    ROW = "each device reads some of the input channels, and the partial results are summed"


@dataclasses.dataclass(frozen=True)
class TPSpec:
    """How tensor parallelism divides a layer among devices.

    Attributes:
        kind: Which channels are divided.
        multiple_of: How many neighbouring channels stay together, such as those of a head.
        chunks: How many parts the channels consist of, side by side; every device has some of each.
        precomputed: Whether the layer is applied once per call; then its output is divided whatever the parallelism.
    """

    kind: TPKind
    multiple_of: int = 1
    chunks: int = 1
    precomputed: bool = False


def variance_scaling(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Normal with variance 1 / fan_in."""
    return jax.random.normal(key, shape, dtype) * (1 / math.prod(shape[:-1])) ** 0.5


class _AnyKey:
    """In the place of nnx.Rngs where values do not matter; its counting of keys takes ten seconds for a full-size model."""

    def params(self) -> Array:
        return jax.random.key(0)


def abstract(build: Callable[..., nnx.Module]) -> nnx.Module:
    """A module of shapes without values. build: makes the module, of `rngs`."""
    return nnx.eval_shape(lambda: build(rngs=_AnyKey()))


def as_dtype(param: nnx.Param, x: Array) -> Array:
    """A parameter's value in the dtype of the activations (a cast only where a caller mixes the two on purpose)."""
    return param.get_value().astype(x.dtype)


class Linear(nnx.Module):
    """y = x kernel + bias; kernel [in, out]. A layer that may be cut by input channels is handed the exchange."""

    def __init__(
        self, features_in: int, features_out: int, *, bias: bool = True, tp: TPSpec | None = None, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(variance_scaling(rngs.params(), (features_in, features_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features_out,))) if bias else None
        self.tp = tp

    def __call__(self, x: Float[Array, "... i"], exchange: Exchange | None = None) -> Float[Array, "... o"]:
        y = x @ as_dtype(self.kernel, x)
        if exchange is not None:
            y = exchange.whole_sum(y)
        return y if self.bias is None else plus(y, as_dtype(self.bias, x))


class Conv(nnx.Module):
    """Convolution, NHWC, kernel HWIO. A 3x3 kernel asks the exchange for the rows above and below; 1x1 does not.

    stride: 1 or 2. trailing: pad below and to the right only (the VAE's downsampling); otherwise one on each side.
    """

    def __init__(
        self,
        channels_in,
        channels_out,
        kernel=3,
        *,
        stride=1,
        trailing=False,
        tp: TPSpec | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (kernel, kernel, channels_in, channels_out)
        self.kernel = nnx.Param(variance_scaling(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels_out,)))
        self.stride, self.trailing, self.tp, self.path = stride, trailing, tp, ""

    def __call__(self, x: Float[Array, "b h w c"], exchange: Exchange | None = None) -> Float[Array, "b H W C"]:
        kernel = as_dtype(self.kernel, x)
        summed = self.tp is not None and self.tp.kind is TPKind.ROW
        if summed:
            x = exchange.channels(x, kernel.shape[2])
        before, after = (0, 1) if self.trailing else (kernel.shape[0] // 2,) * 2
        if kernel.shape[0] > 1:
            # with stride 2 and an even number of rows, padding (1, 1) never reads the row below
            below = 0 if self.stride == 2 and not self.trailing and x.shape[1] % 2 == 0 else after
            x = exchange.halo(self.path, x, before, below)
        y = convolve(x, kernel, self.stride, (before, after))
        if summed:
            y = exchange.whole_sum(y)
        return plus(y, as_dtype(self.bias, x))


class GroupNorm(nnx.Module):
    """Group normalisation over the whole image, statistics in float32, as torch.nn.GroupNorm (population variance)."""

    def __init__(self, channels: int, groups: int, eps: float, *, tp: TPSpec | None = None):
        self.scale, self.bias = nnx.Param(jnp.ones((channels,))), nnx.Param(jnp.zeros((channels,)))
        self.size, self.eps, self.tp, self.path = channels // groups, eps, tp, ""

    def __call__(self, x: Float[Array, "b h w c"], exchange: Exchange) -> Float[Array, "b h w c"]:
        def spread(values):
            return jnp.repeat(values, self.size, axis=1)

        x32 = x.astype(jnp.float32)
        mean, variance = jnp.moveaxis(exchange.moments(self.path, x32, self.size), -1, 0)
        factor = times(spread(lax.rsqrt(variance + self.eps)), as_dtype(self.scale, x32))
        shift = plus(-spread(mean) * factor, as_dtype(self.bias, x32))
        return (x32 * factor[:, None, None] + shift[:, None, None]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation over the last axis, statistics in float32, as torch.nn.LayerNorm."""

    def __init__(self, features: int, eps: float = 1e-5):
        self.scale, self.bias = nnx.Param(jnp.ones((features,))), nnx.Param(jnp.zeros((features,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, -1, keepdims=True)
        variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
        y = (x32 - mean) * lax.rsqrt(variance + self.eps)
        return plus(times(y, as_dtype(self.scale, y)), as_dtype(self.bias, y)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, looked up by id."""

    def __init__(self, entries: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (entries, features)))

    def __call__(self, ids: Array) -> Array:
        return self.embedding.get_value()[ids]


def sinusoidal(
    values: Float[Array, "n"], size: int, *, flip_sin_to_cos: bool, shift: float
) -> Float[Array, "n {size}"]:
    """Sinusoidal embedding of timesteps, as diffusers' get_timestep_embedding (float32)."""
    half = size // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = values.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(parts, -1), ((0, 0), (0, size % 2)))


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Each pixel becomes 2 x 2."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def gelu(x: Array) -> Array:
    """The exact GELU, as torch's default, in float32 as there; by erf, which is one operation to XLA, not erfc's eighty."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), as in OpenAI's CLIP."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": quick_gelu, "silu": jax.nn.silu}


def name_layers(module: nnx.Module) -> None:
    """Tells every layer that asks for it its own path, e.g. `down_blocks.0.resnets.1.conv1`."""
    for path, part in walk(module):
        if hasattr(part, "path"):
            part.path = ".".join(map(str, path))


def walk(module: nnx.Module, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], nnx.Module]]:
    """A module and all of its parts, with their paths."""
    yield path, module
    children = enumerate(module) if isinstance(module, nnx.List) else list(vars(module).items())
    for key, child in children:
        if isinstance(child, nnx.Module):
            yield from walk(child, (*path, key))


def plus(x: Array, bias: Array) -> Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def times(x: Array, scale: Array) -> Array:
    return x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
