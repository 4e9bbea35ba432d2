"""The layers of the UNet, the VAE and the text encoders.

Parameters are named as in diffusers. Layers that need other rows than their own ask the exchange, under their path in the
model, which `name_layers` sets once; no layer knows a mesh axis.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator
from functools import partial

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
        multiple_of: Number of adjacent channels that stay together, such as those of a head.
        chunks: Number of parts that the channels are a concatenation of; every device has some of each.
        precomputed: Whether the layer is applied once per call; its output is then divided with every parallelism.
    """

    kind: TPKind
    multiple_of: int = 1
    chunks: int = 1
    precomputed: bool = False


def normal(key: Array | None, shape: tuple[int, ...], stddev: float) -> Array:
    """Initial values, float32: normally distributed, or zeros without a key.

    Args:
        key: A random key, or None.
        shape: Shape of the result.
        stddev: Standard deviation.
    """
    return jnp.zeros(shape, jnp.float32) if key is None else jax.random.normal(key, shape, jnp.float32) * stddev


def variance_scaling(key: Array | None, shape: tuple[int, ...]) -> Array:
    """`normal` of variance 1 / fan_in, for a kernel whose last axis is the output.

    Args:
        key: A random key, or None.
        shape: Shape of the kernel.
    """
    return normal(key, shape, (1 / math.prod(shape[:-1])) ** 0.5)


class _NoKeys:
    """Takes the place of `nnx.Rngs` where values do not matter: keys and random numbers take long to trace."""

    def params(self) -> None:
        return None


def abstract(build: Callable[..., nnx.Module]) -> nnx.Module:
    """A module of shapes without values.

    Args:
        build: Makes the module, given the keyword `rngs`.
    """
    return nnx.eval_shape(lambda: build(rngs=_NoKeys()))


def _as_dtype(param: nnx.Param, x: Array) -> Array:
    """A parameter's value in the dtype of the activations; it is cast only where a caller mixes dtypes on purpose."""
    return param.get_value().astype(x.dtype)


class Linear(nnx.Module):
    """y = x kernel + bias, with kernel [in, out]. Row-parallel layers (`TPKind.ROW`) are called with the exchange."""

    def __init__(
        self, features_in: int, features_out: int, *, bias: bool = True, tp: TPSpec | None = None, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(variance_scaling(rngs.params(), (features_in, features_out)))
        self.bias = nnx.Param(jnp.zeros((features_out,))) if bias else None
        self.tp = tp

    def __call__(self, x: Float[Array, "... i"], exchange: Exchange | None = None) -> Float[Array, "... o"]:
        y = x @ _as_dtype(self.kernel, x)
        if exchange is not None:
            y = exchange.whole_sum(y)
        return y if self.bias is None else _add_bias(y, _as_dtype(self.bias, x))


class Conv(nnx.Module):
    """Convolution, NHWC, with kernel HWIO. A 3x3 kernel asks the exchange for the rows above and below; 1x1 does not.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        kernel: Height and width of the kernel, 1 or 3.
        stride: 1 or 2.
        trailing: Whether to pad below and to the right only (the VAE's downsampling) instead of on each side.
        tp: How tensor parallelism divides the layer, if it does.
        rngs: Keys of the initial values.
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
        self.kernel = nnx.Param(variance_scaling(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((channels_out,)))
        self.stride, self.trailing, self.tp, self.path = stride, trailing, tp, ""

    def __call__(self, x: Float[Array, "b h w c"], exchange: Exchange | None = None) -> Float[Array, "b H W C"]:
        kernel = _as_dtype(self.kernel, x)
        row_parallel = self.tp is not None and self.tp.kind is TPKind.ROW
        if row_parallel:
            x = exchange.channels(x, kernel.shape[2])
        before, after = (0, 1) if self.trailing else (kernel.shape[0] // 2,) * 2
        if kernel.shape[0] > 1:
            # with stride 2 and an even number of rows, padding (1, 1) never reads the row below
            below = 0 if self.stride == 2 and not self.trailing and x.shape[1] % 2 == 0 else after
            x = exchange.halo(self.path, x, before, below)
        y = convolve(x, kernel, self.stride, (before, after))
        if row_parallel:
            y = exchange.whole_sum(y)
        return _add_bias(y, _as_dtype(self.bias, x))


class GroupNorm(nnx.Module):
    """Group normalisation over the whole image, in float32, as torch.nn.GroupNorm (population variance)."""

    def __init__(self, channels: int, groups: int, eps: float, *, tp: TPSpec | None = None):
        self.scale, self.bias = nnx.Param(jnp.ones((channels,))), nnx.Param(jnp.zeros((channels,)))
        self.size, self.eps, self.tp, self.path = channels // groups, eps, tp, ""

    def __call__(self, x: Float[Array, "b h w c"], exchange: Exchange) -> Float[Array, "b h w c"]:
        def spread(values):
            return jnp.repeat(values, self.size, axis=1)

        x32 = x.astype(jnp.float32)
        mean, variance = jnp.moveaxis(exchange.moments(self.path, x32, self.size), -1, 0)
        factor = _multiply(spread(lax.rsqrt(variance + self.eps)), _as_dtype(self.scale, x32))
        shift = _add_bias(-spread(mean) * factor, _as_dtype(self.bias, x32))
        return (x32 * factor[:, None, None] + shift[:, None, None]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation over the last axis, in float32, as torch.nn.LayerNorm."""

    def __init__(self, features: int, eps: float = 1e-5):
        self.scale, self.bias = nnx.Param(jnp.ones((features,))), nnx.Param(jnp.zeros((features,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return _layer_norm(x, self.scale.get_value(), self.bias.get_value(), self.eps)


@partial(jax.jit, static_argnames="eps")
def _layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
    y = (x32 - mean) * lax.rsqrt(variance + eps)
    return _add_bias(_multiply(y, scale.astype(y.dtype)), bias.astype(y.dtype)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors [entries, features], looked up by id."""

    def __init__(self, entries: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(rngs.params(), (entries, features), 0.02))

    def __call__(self, ids: Array) -> Array:
        return self.embedding.get_value()[ids]


def sinusoidal(
    values: Float[Array, "n"], size: int, *, flip_sin_to_cos: bool, shift: float
) -> Float[Array, "n {size}"]:
    """Sinusoidal embedding of timesteps, [n, size], float32, as diffusers' `get_timestep_embedding`.

    Args:
        values: Timesteps, [n].
        size: Length of an embedding.
        flip_sin_to_cos: Whether cosines come before sines.
        shift: diffusers' `downscale_freq_shift`.
    """
    half = size // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = values.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(parts, -1), ((0, 0), (0, size % 2)))


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Doubles height and width by repetition of each pixel.

    Args:
        x: Hidden states.
    """
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


@jax.jit
def gelu(x: Array) -> Array:
    """The exact GELU, computed in float32, as torch's default. XLA has one operation for erf, and about 80 for erfc.

    Args:
        x: Of any shape and floating dtype, which the result keeps.
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


def _quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), as in OpenAI's CLIP."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "quick_gelu": _quick_gelu, "silu": jax.nn.silu}


def name_layers(module: nnx.Module, prefix: str = "") -> None:
    """Sets `path` of every layer that has one to its path in the module, e.g. `down_blocks.0.resnets.1.conv1`.

    Args:
        module: The outermost module.
        prefix: What stands before each path; models that ask the same exchange need different ones.
    """
    for path, part in walk(module):
        if hasattr(part, "path"):
            part.path = prefix + ".".join(map(str, path))


def walk(module: nnx.Module, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], nnx.Module]]:
    """A module and all modules in it, each after its path.

    Args:
        module: The outermost module.
        path: Its own path.
    """
    yield path, module
    children = enumerate(module) if isinstance(module, nnx.List) else list(vars(module).items())
    for key, child in children:
        if isinstance(child, nnx.Module):
            yield from walk(child, (*path, key))


def _add_bias(x: Float[Array, "... c"], bias: Float[Array, "c"]) -> Float[Array, "... c"]:
    """x + bias, without implicit rank promotion."""
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _multiply(x: Float[Array, "... c"], scale: Float[Array, "c"]) -> Float[Array, "... c"]:
    """x * scale, without implicit rank promotion."""
    return x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
