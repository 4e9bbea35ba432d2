"""Multi-head attention: cuDNN's fused kernel where it is available, in chunks everywhere else."""

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
from distrijax.parallel.platform import platform_dependent

ATTENTION_CHUNK, TPU_ATTENTION_CHUNK, CPU_ATTENTION_CHUNK = 2**22, 2**24, 2**20
"""Most attention scores that are held at a time without cuDNN: on GPUs, TPUs and CPUs, where more would be newly allocated in
each call."""

MIN_CUDNN_CAPABILITY = 8.0
"""Compute capability (Ampere's) from which on cuDNN has a fused attention."""

MIN_CHUNK_QUERIES = 128
"""Fewest queries of a chunk, however many keys there are."""


class Attention(nnx.Module):
    """Multi-head attention with diffusers' parameters: `to_q`, `to_k`, `to_v`, `to_out.0`.

    Self-attention reads the whole image: the exchange turns the keys and values of the patch into those of all patches.
    Cross-attention reads the keys and values of the prompt, which `project_context` computes once per call.

    Args:
        channels: Channels of the input and the output.
        heads: Number of heads.
        context: Features of the prompt's embeddings, for cross-attention; None for self-attention.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        rngs: Keys of the initial values.
    """

    def __init__(self, channels, heads, *, context=None, qkv_bias=False, rngs: nnx.Rngs):
        self.channels, self.head_size, self.path = channels, channels // heads, ""
        inner = dict(bias=qkv_bias, rngs=rngs)
        source = dict(tp=TPSpec(TPKind.COLUMN, self.head_size, precomputed=context is not None), **inner)
        # layers whose kernels `ModelLayout` may concatenate
        self.same_input = ("to_q", "to_k", "to_v") if context is None else ()
        self.to_q = Linear(channels, channels, tp=TPSpec(TPKind.COLUMN, self.head_size), **inner)
        self.to_k = Linear(context or channels, channels, **source)
        self.to_v = Linear(context or channels, channels, **source)
        self.to_out = nnx.List([Linear(channels, channels, tp=TPSpec(TPKind.ROW, self.head_size), rngs=rngs)])

    def project_context(self, context: Float[Array, "... c"]) -> KeysValues:
        """Keys and values of a prompt or, for self-attention, of the patch.

        Args:
            context: Embeddings of the prompt, or hidden states of the patch, `[..., positions, features]`.

        Returns:
            Keys and values, `[..., positions, channels]` each.
        """
        return self.to_k(context), self.to_v(context)

    def __call__(
        self, x: Float[Array, "b ... c"], exchange: Exchange, kv: KeysValues | None = None
    ) -> Float[Array, "b ... c"]:
        """Attention from `x` to the whole image, or to `kv` (of `project_context`) for cross-attention."""
        query = self.to_q(x)
        if kv is None:
            kv = exchange.kv(self.path, jnp.concatenate(self.project_context(x), -1))
        key, value = kv
        heads = [t.reshape(t.shape[0], -1, t.shape[-1] // self.head_size, self.head_size) for t in (query, key, value)]
        return self.to_out[0](attend(*heads).reshape(query.shape), exchange)


def attend(
    query: Float[Array, "b q n d"], key: Float[Array, "b k n d"], value: Float[Array, "b k n d"]
) -> Float[Array, "b q n d"]:
    """Softmax attention that never holds all scores of a large image.

    On NVIDIA GPUs it is cuDNN's where that supports the case (16 bits, a head size that is a multiple of 8 and at most 128,
    Ampere or newer); everywhere else it is computed in chunks.

    Args:
        query: `[b, queries, heads, head size]`.
        key: `[b, keys, heads, head size]`.
        value: `[b, keys, heads, head size]`.
    """
    head_size = query.shape[-1]
    chunks = {"cpu": CPU_ATTENTION_CHUNK, "tpu": TPU_ATTENTION_CHUNK, "default": ATTENTION_CHUNK}
    implementations = {
        platform: functools.partial(_chunked_attention, chunk=chunk, min_queries=MIN_CHUNK_QUERIES)
        for platform, chunk in chunks.items()
    }
    if query.dtype in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= 128 and _cudnn_available():
        implementations["cuda"] = _cudnn_attention
    return platform_dependent(query, key, value, **implementations)


def _cudnn_attention(query: Array, key: Array, value: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


@functools.cache
def _cudnn_available() -> bool:
    """Whether JAX finds cuDNN (without it even tracing for another machine fails), and no GPU here is too old for it."""
    example = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(_cudnn_attention, example, example, example)
    except RuntimeError:
        return False
    try:
        gpus = jax.local_devices(backend="cuda")
    except RuntimeError:  # no GPU here: this compiles for one that is described
        return True
    return all(float(gpu.compute_capability) >= MIN_CUDNN_CAPABILITY for gpu in gpus)


@functools.partial(jax.jit, static_argnames=("chunk", "min_queries"))  # layers of the same shapes share one trace
def _chunked_attention(query: Array, key: Array, value: Array, chunk: int, min_queries: int) -> Array:
    """Some heads at a time, or some queries of one head where a head has more than `chunk` scores; at least `min_queries`.

    Heads become the first axis, so that no matmul reads strided operands.
    """
    b, queries, n, d = query.shape
    # the queries are scaled, for they are fewer than the scores; in 16 bits this is exact where d is a power of 4 (SDXL: 64)
    scale = jnp.asarray(d**-0.5, query.dtype)
    query, key, value = (jnp.moveaxis(t, 2, 1).reshape(b * n, -1, d) for t in (query * scale, key, value))
    keys = key.shape[1]
    most_heads = min(chunk // (queries * keys), b * n)
    heads = max((count for count in range(1, most_heads + 1) if b * n % count == 0), default=1)
    parts = math.ceil(queries / max(min_queries, chunk // keys))
    rows = math.ceil(queries / parts)
    padded = jnp.pad(query, ((0, 0), (0, parts * rows - queries), (0, 0)))
    padded = jnp.moveaxis(padded.reshape(-1, heads, parts, rows, d), 2, 1)

    def some_heads(query: Array, key: Array, value: Array) -> Array:
        return _map(lambda rows: _plain_attention(rows, key, value), query)

    out = _map(some_heads, padded, *(t.reshape(-1, heads, keys, d) for t in (key, value)))
    return jnp.moveaxis(jnp.moveaxis(out, 1, 2).reshape(b, n, -1, d)[:, :, :queries], 1, 2)


def _map(function: Callable[..., Array], *arrays: Array) -> Array:
    """`lax.map` over the first axis, without a loop where that has one entry."""
    if arrays[0].shape[0] == 1:
        return function(*(array[0] for array in arrays))[None]
    return lax.map(lambda each: function(*each), arrays)


def _plain_attention(
    query: Float[Array, "n q d"], key: Float[Array, "n k d"], value: Float[Array, "n k d"]
) -> Float[Array, "n q d"]:
    """Attention of scaled queries. The division by the sum comes last: the result is smaller than the weights."""
    scores = jnp.einsum("nqd,nkd->nqk", query, key, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    out = jnp.einsum("nqk,nkd->nqd", weights.astype(query.dtype), value, preferred_element_type=jnp.float32)
    return (out / jnp.sum(weights, -1, keepdims=True)).astype(query.dtype)
