"""The layers of the UNet, the VAE and the text encoders.

Parameters are named as in diffusers. Layers that look beyond their own rows ask the exchange and know no mesh axis;
they are told their own path in the model once, by `name_layers`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from distrijax.convolution import convolve
from distrijax.exchange import Exchange, KeysValues

ATTENTION_CHUNK, TPU_ATTENTION_CHUNK, CPU_ATTENTION_CHUNK = 2**22, 2**24, 2**20
"""Elements of the scores that an attention without cuDNN holds at a time. On CPUs more would be fresh memory in each call."""

CUDNN_CAPABILITY = 8.0
"""Compute capability (Ampere's) from which on cuDNN has a fused attention."""

ATTENTION_ROWS = 128
"""Queries that it takes at a time at least, however many keys there are."""


class Side(enum.Enum):
    """Which channels of a layer tensor parallelism divides."""

    OUTPUT = "each device computes some of the output channels"
    INPUT = "each device reads some of the input channels, and the products are summed"


@dataclasses.dataclass(frozen=True)
class Cut:
    """How tensor parallelism divides a layer among devices.

    unit: channels that stay together, as those of a head. parts: the channels are so many parts side by side, and every
    device has some of each. once: the layer is applied once a call, and so its output is divided whatever the parallelism.
    """

    side: Side
    unit: int = 1
    parts: int = 1
    once: bool = False


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
        self, features_in: int, features_out: int, *, bias: bool = True, cut: Cut | None = None, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(variance_scaling(rngs.params(), (features_in, features_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features_out,))) if bias else None
        self.cut = cut

    def __call__(self, x: Float[Array, "... i"], exchange: Exchange | None = None) -> Float[Array, "... o"]:
        y = x @ as_dtype(self.kernel, x)
        if exchange is not None:
            y = exchange.whole_sum(y)
        return y if self.bias is None else _plus(y, as_dtype(self.bias, x))


class Conv(nnx.Module):
    """Convolution, NHWC, kernel HWIO. A 3x3 kernel asks the exchange for the rows above and below; 1x1 does not.

    stride: 1 or 2. trailing: pad below and to the right only (the VAE's downsampling); otherwise one on each side.
    """

    def __init__(
        self, channels_in, channels_out, kernel=3, *, stride=1, trailing=False, cut: Cut | None = None, rngs: nnx.Rngs
    ):
        shape = (kernel, kernel, channels_in, channels_out)
        self.kernel = nnx.Param(variance_scaling(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels_out,)))
        self.stride, self.trailing, self.cut, self.path = stride, trailing, cut, ""

    def __call__(self, x: Float[Array, "b h w c"], exchange: Exchange | None = None) -> Float[Array, "b H W C"]:
        kernel = as_dtype(self.kernel, x)
        summed = self.cut is not None and self.cut.side is Side.INPUT
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
        return _plus(y, as_dtype(self.bias, x))


class GroupNorm(nnx.Module):
    """Group normalisation over the whole image, statistics in float32, as torch.nn.GroupNorm (population variance)."""

    def __init__(self, channels: int, groups: int, eps: float, *, cut: Cut | None = None):
        self.scale, self.bias = nnx.Param(jnp.ones((channels,))), nnx.Param(jnp.zeros((channels,)))
        self.size, self.eps, self.cut, self.path = channels // groups, eps, cut, ""

    def __call__(self, x: Float[Array, "b h w c"], exchange: Exchange) -> Float[Array, "b h w c"]:
        def spread(values):
            return jnp.repeat(values, self.size, axis=1)

        x32 = x.astype(jnp.float32)
        mean, variance = jnp.moveaxis(exchange.moments(self.path, x32, self.size), -1, 0)
        factor = _times(spread(lax.rsqrt(variance + self.eps)), as_dtype(self.scale, x32))
        shift = _plus(-spread(mean) * factor, as_dtype(self.bias, x32))
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
        return _plus(_times(y, as_dtype(self.scale, y)), as_dtype(self.bias, y)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors, looked up by id."""

    def __init__(self, entries: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (entries, features)))

    def __call__(self, ids: Array) -> Array:
        return self.embedding.get_value()[ids]


class Attention(nnx.Module):
    """Multi-head attention of diffusers: `to_q`, `to_k`, `to_v`, `to_out.0`.

    Without a context it is self-attention over the whole image: the exchange turns the patch's keys and values into
    everyone's. With `kv` (from `project_context`) it is cross-attention, which never leaves the patch.
    """

    def __init__(self, channels, heads, *, context=None, qkv_bias=False, rngs: nnx.Rngs):
        self.channels, self.head, self.path = channels, channels // heads, ""
        inner = dict(bias=qkv_bias, rngs=rngs)
        source = dict(cut=Cut(Side.OUTPUT, self.head, once=context is not None), **inner)
        # layers whose kernels `placement` may put together
        self.same_input = ("to_q", "to_k", "to_v") if context is None else ()
        self.to_q = Linear(channels, channels, cut=Cut(Side.OUTPUT, self.head), **inner)
        self.to_k = Linear(context or channels, channels, **source)
        self.to_v = Linear(context or channels, channels, **source)
        self.to_out = nnx.List([Linear(channels, channels, cut=Cut(Side.INPUT, self.head), rngs=rngs)])

    def project_context(self, context: Float[Array, "... c"]) -> KeysValues:
        """Keys and values, [..., channels] each."""
        return self.to_k(context), self.to_v(context)

    def __call__(
        self, x: Float[Array, "b ... c"], exchange: Exchange, kv: KeysValues | None = None
    ) -> Float[Array, "b ... c"]:
        query = self.to_q(x)
        if kv is None:
            kv = exchange.tokens(self.path, jnp.concatenate(self.project_context(x), -1))
        key, value = kv
        heads = [t.reshape(t.shape[0], -1, t.shape[-1] // self.head, self.head) for t in (query, key, value)]
        return self.to_out[0](attend(*heads).reshape(query.shape), exchange)


def attend(
    query: Float[Array, "b q n d"], key: Float[Array, "b k n d"], value: Float[Array, "b k n d"]
) -> Float[Array, "b q n d"]:
    """Softmax attention that never holds a whole query x key matrix of a large image.

    cuDNN on NVIDIA where it can (16-bit, head size a multiple of 8 up to 128, Ampere or newer), in chunks everywhere else.
    """
    head = query.shape[-1]
    ways = {
        "cpu": functools.partial(_chunked_attention, chunk=CPU_ATTENTION_CHUNK),
        "tpu": functools.partial(_chunked_attention, chunk=TPU_ATTENTION_CHUNK),
        "default": functools.partial(_chunked_attention, chunk=ATTENTION_CHUNK),
    }
    if query.dtype in (jnp.bfloat16, jnp.float16) and head % 8 == 0 and head <= 128 and _cudnn_attends():
        ways["cuda"] = _cudnn_attention
    return lax.platform_dependent(query, key, value, **ways)


def _cudnn_attention(query: Array, key: Array, value: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


@functools.cache
def _cudnn_attends() -> bool:
    """Whether JAX finds cuDNN, without which even tracing for another platform fails, and no GPU here is too old for it."""
    example = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(_cudnn_attention, example, example, example)
    except RuntimeError:
        return False
    try:
        gpus = jax.local_devices(backend="cuda")
    except RuntimeError:  # none: this compiles for GPUs that are elsewhere
        return True
    return all(float(gpu.compute_capability) >= CUDNN_CAPABILITY for gpu in gpus)


def _chunked_attention(query: Array, key: Array, value: Array, chunk: int) -> Array:
    """Some heads at a time, or some queries of a head that has more than `chunk` scores. Heads first: no product is strided."""
    b, queries, n, d = query.shape
    # of the queries, of which there are fewer than scores; in 16 bits exact where d is a power of 4, as SDXL's 64
    scale = jnp.asarray(d**-0.5, query.dtype)
    query, key, value = (jnp.moveaxis(t, 2, 1).reshape(b * n, -1, d) for t in (query * scale, key, value))
    keys = key.shape[1]
    fitting = chunk // (queries * keys)
    together = max((heads for heads in range(1, min(fitting, b * n) + 1) if b * n % heads == 0), default=1)
    parts = math.ceil(queries / max(ATTENTION_ROWS, chunk // keys))
    rows = math.ceil(queries / parts)
    filled = jnp.pad(query, ((0, 0), (0, parts * rows - queries), (0, 0)))
    filled = jnp.moveaxis(filled.reshape(-1, together, parts, rows, d), 2, 1)

    def some_heads(query: Array, key: Array, value: Array) -> Array:
        return _in_turn(lambda rows: _plain_attention(rows, key, value), query)

    out = _in_turn(some_heads, filled, *(t.reshape(-1, together, keys, d) for t in (key, value)))
    return jnp.moveaxis(jnp.moveaxis(out, 1, 2).reshape(b, n, -1, d)[:, :, :queries], 1, 2)


def _in_turn(function: Callable[..., Array], *parts: Array) -> Array:
    """`function` of one entry of the first axis after the other."""
    if parts[0].shape[0] == 1:
        return function(*(part[0] for part in parts))[None]
    return lax.map(lambda each: function(*each), parts)


def _plain_attention(
    query: Float[Array, "n q d"], key: Float[Array, "n k d"], value: Float[Array, "n k d"]
) -> Float[Array, "n q d"]:
    """Of scaled queries. The sum divides the result, which is smaller than the weights."""
    scores = jnp.einsum("nqd,nkd->nqk", query, key, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    out = jnp.einsum("nqk,nkd->nqd", weights.astype(query.dtype), value, preferred_element_type=jnp.float32)
    return (out / jnp.sum(weights, -1, keepdims=True)).astype(query.dtype)


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


def _plus(x: Array, bias: Array) -> Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _times(x: Array, scale: Array) -> Array:
    return x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
