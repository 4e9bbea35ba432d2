"""The blocks that the UNet and the VAE consist of, named as in diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distrijax.models.attention import Attention
from distrijax.models.layers import (
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    TPKind,
    TPSpec,
    gelu,
    upsample_nearest,
)
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.collectives import KeysValues
from distrijax.parallel.exchange import Exchange


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between them.

    Args:
        features_in: Features of the input.
        features: Features of the output.
        condition: Features of a second input, which the caller projects by `cond_proj` and adds to the first; None has none.
        rngs: Keys of the initial values.
    """

    def __init__(self, features_in: int, features: int, *, condition: int | None = None, rngs: nnx.Rngs):
        self.cond_proj = Linear(condition, features_in, bias=False, rngs=rngs) if condition else None
        self.linear_1 = Linear(features_in, features, rngs=rngs)
        self.linear_2 = Linear(features, features, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, with the time embedding added between them.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        time: Features of the time embedding; None has none (VAE).
        groups: Groups of the normalisations.
        eps: Epsilon of the normalisations.
        rngs: Keys of the initial values.
    """

    def __init__(self, channels_in, channels_out, *, time: int | None, groups: int, eps: float, rngs: nnx.Rngs):
        inner = TPSpec(TPKind.COLUMN, channels_out // groups)
        self.norm1 = GroupNorm(channels_in, groups, eps)
        self.conv1 = Conv(channels_in, channels_out, tp=inner, rngs=rngs)
        self.time_emb_proj = Linear(time, channels_out, tp=inner, rngs=rngs) if time else None
        self.norm2 = GroupNorm(channels_out, groups, eps, tp=inner)
        self.conv2 = Conv(channels_out, channels_out, tp=TPSpec(TPKind.ROW, inner.multiple_of), rngs=rngs)
        self.conv_shortcut = Conv(channels_in, channels_out, 1, rngs=rngs) if channels_in != channels_out else None
        self.path = ""

    def project_time(self, embedding: Float[Array, "b t"]) -> Float[Array, "b C"]:
        """The `time` of a call; with tensor parallelism this device's channels of it.

        Args:
            embedding: Of the timestep.
        """
        return self.time_emb_proj(jax.nn.silu(embedding))

    def __call__(
        self, x: Float[Array, "b h w c"], exchange: Exchange, time: Float[Array, "b C"] | None = None
    ) -> Float[Array, "b h w o"]:
        h = self.conv1(jax.nn.silu(self.norm1(x, exchange)), exchange)
        if self.time_emb_proj is not None:
            h = h + time[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h, exchange)), exchange)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class GEGLU(nnx.Module):
    """Gated GELU: half of one projection gates the other half."""

    def __init__(self, channels: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = Linear(channels, 2 * inner, tp=TPSpec(TPKind.COLUMN, chunks=2), rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... i"]:
        value, gate = jnp.split(self.proj(x), 2, -1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """GEGLU and a projection back to `channels`; `net.1` is dropout in diffusers and has no parameters."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        last = Linear(4 * channels, channels, tp=TPSpec(TPKind.ROW), rngs=rngs)
        self.net = nnx.List([GEGLU(channels, 4 * channels, rngs=rngs), None, last])

    def __call__(self, x: Float[Array, "... c"], exchange: Exchange) -> Float[Array, "... c"]:
        return self.net[2](self.net[0](x), exchange)


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each on normalised input and added to it."""

    def __init__(self, channels: int, heads: int, context: int, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, heads, rngs=rngs)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context=context, rngs=rngs)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], exchange: Exchange, context: dict[str, KeysValues]
    ) -> Float[Array, "b h w c"]:
        x = x + self.attn1(self.norm1(x), exchange)
        x = x + self.attn2(self.norm2(x), exchange, context[self.attn2.path])
        return x + self.ff(self.norm3(x), exchange)


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a band of rows, in raster order.

    Args:
        config: The UNet's.
        block: Index of the level, from the outermost.
        depth: Number of transformer blocks.
        rngs: Keys of the initial values.
    """

    def __init__(self, config: UNetConfig, block: int, depth: int, *, rngs: nnx.Rngs):
        channels = config.block_out_channels[block]
        self.norm = GroupNorm(channels, config.norm_num_groups, 1e-6)
        project = Linear if config.use_linear_projection else lambda i, o, rngs: Conv(i, o, 1, rngs=rngs)
        self.proj_in = project(channels, channels, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(channels, config.heads[block], config.context(block), rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.proj_out = project(channels, channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], exchange: Exchange, context: dict[str, KeysValues]) -> Array:
        # a linear layer and a 1x1 convolution are the same function
        inner = self.proj_in(self.norm(x, exchange))
        for block in self.transformer_blocks:
            inner = block(inner, exchange, context)
        return x + self.proj_out(inner)


class Downsample2D(nnx.Module):
    """3x3 convolution of stride 2."""

    def __init__(self, channels: int, *, trailing: bool = False, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, trailing=trailing, tp=TPSpec(TPKind.ROW), rngs=rngs)

    def __call__(self, x: Array, exchange: Exchange) -> Array:
        return self.conv(x, exchange)


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, tp=TPSpec(TPKind.ROW), rngs=rngs)

    def __call__(self, x: Array, exchange: Exchange, size: tuple[int, int] | None = None) -> Array:
        """Doubles `x`, and cuts it to `size` (height, width) where the next level has one row or column less than that."""
        height, width = size or (None, None)
        return self.conv(upsample_nearest(x)[:, :height, :width], exchange)
