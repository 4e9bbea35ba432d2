"""Attention: cuDNN's where it can be had, and in chunks everywhere else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from distrijax.models.layers import Linear, TPKind, TPSpec
from distrijax.parallel.collectives import KeysValues
from distrijax.parallel.exchange import Exchange

ATTENTION_CHUNK, TPU_ATTENTION_CHUNK, CPU_ATTENTION_CHUNK = 2**22, 2**24, 2**20
"""Elements of the scores that an attention without cuDNN holds at a time. On CPUs more would be fresh memory in each call."""

CUDNN_CAPABILITY = 8.0
"""Compute capability (Ampere's) from which on cuDNN has a fused attention."""

ATTENTION_ROWS = 128
"""Queries that it takes at a time at least, however many keys there are."""


class Attention(nnx.Module):
    """Multi-head attention of diffusers: `to_q`, `to_k`, `to_v`, `to_out.0`.

    Without a context it is self-attention over the whole image: the exchange turns the patch's keys and values into
    everyone's. With `kv` (from `project_context`) it is cross-attention, which never leaves the patch.
    """

    def __init__(self, channels, heads, *, context=None, qkv_bias=False, rngs: nnx.Rngs):
        self.channels, self.head, self.path = channels, channels // heads, ""
        inner = dict(bias=qkv_bias, rngs=rngs)
        source = dict(tp=TPSpec(TPKind.COLUMN, self.head, precomputed=context is not None), **inner)
        # layers whose kernels `placement` may put together
        self.same_input = ("to_q", "to_k", "to_v") if context is None else ()
        self.to_q = Linear(channels, channels, tp=TPSpec(TPKind.COLUMN, self.head), **inner)
        self.to_k = Linear(context or channels, channels, **source)
        self.to_v = Linear(context or channels, channels, **source)
        self.to_out = nnx.List([Linear(channels, channels, tp=TPSpec(TPKind.ROW, self.head), rngs=rngs)])

    def project_context(self, context: Float[Array, "... c"]) -> KeysValues:
        """Keys and values, [..., channels] each."""
        return self.to_k(context), self.to_v(context)

    def __call__(
        self, x: Float[Array, "b ... c"], exchange: Exchange, kv: KeysValues | None = None
    ) -> Float[Array, "b ... c"]:
        query = self.to_q(x)
        if kv is None:
            kv = exchange.kv(self.path, jnp.concatenate(self.project_context(x), -1))
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
