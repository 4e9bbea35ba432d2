"""AutoencoderKL: images to latents and back, on the whole image or on bands of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distrijax.errors import CheckpointError
from distrijax.json_config import ModelConfig
from distrijax.models.attention import Attention
from distrijax.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from distrijax.models.layers import Conv, GroupNorm, name_layers
from distrijax.parallel.exchange import Exchange
from distrijax.validate import check_choice


@dataclasses.dataclass(frozen=True)
class VAEConfig(ModelConfig):
    """The keys of a VAE's config.json that shape it, with the meaning that diffusers' AutoencoderKL gives them."""

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    INERT = frozenset({"sample_size"})
    FIXED = {"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,)}

    def __post_init__(self):
        for types, kind in ((self.down_block_types, "DownEncoderBlock2D"), (self.up_block_types, "UpDecoderBlock2D")):
            if len(types) != len(self.block_out_channels):
                raise CheckpointError(
                    f"VAEConfig: {len(types)} block types for {len(self.block_out_channels)} blocks; give one for each"
                )
            for name in types:
                check_choice(name, (kind,), "VAEConfig: block type")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise CheckpointError(
                    f"VAEConfig: {channels} channels do not divide into norm_num_groups={self.norm_num_groups}; change one"
                )

    def compute_dtype(self, dtype: Any) -> jnp.dtype:
        """The dtype that the VAE computes in: float32 in place of float16, where that would overflow (`force_upcast`).

        In diffusers only the SDXL pipeline does this; here every pipeline does.

        Args:
            dtype: What the rest of the pipeline computes in.
        """
        dtype = jnp.dtype(dtype)
        return jnp.dtype(jnp.float32) if self.force_upcast and dtype == jnp.float16 else dtype

    @property
    def scale(self) -> int:
        """Pixels per latent row and column."""
        return 2 ** (len(self.block_out_channels) - 1)


def _resnet(channels_in: int, channels_out: int, config: VAEConfig, rngs: nnx.Rngs) -> ResnetBlock2D:
    return ResnetBlock2D(channels_in, channels_out, time=None, groups=config.norm_num_groups, eps=1e-6, rngs=rngs)


class Level(nnx.Module):
    """Resnets and a sampler.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        depth: Number of resnets.
        sampler: "down" (encoder), "up" (decoder), or None at the last level.
        config: The VAE's.
        rngs: Keys of the initial values.
    """

    def __init__(self, channels_in, channels_out, depth, sampler, config, *, rngs):
        widths = [channels_in] + [channels_out] * (depth - 1)
        self.resnets = nnx.List([_resnet(width, channels_out, config, rngs) for width in widths])
        self.downsamplers = (
            nnx.List([Downsample2D(channels_out, trailing=True, rngs=rngs)]) if sampler == "down" else None
        )
        self.upsamplers = nnx.List([Upsample2D(channels_out, rngs=rngs)]) if sampler == "up" else None

    def __call__(self, x: Array, exchange: Exchange) -> Array:
        for layer in [*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())]:
            x = layer(x, exchange)
        return x


class SpatialAttention(Attention):
    """Self-attention over the whole image with one head, on normalised input and added to it."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        super().__init__(channels, 1, qkv_bias=True, rngs=rngs)
        self.group_norm = GroupNorm(channels, config.norm_num_groups, 1e-6)

    def __call__(self, x: Float[Array, "b h w c"], exchange: Exchange) -> Float[Array, "b h w c"]:
        return x + super().__call__(self.group_norm(x, exchange), exchange)


class VAEMidBlock(nnx.Module):
    """Resnet, attention over the whole image, resnet."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels = config.block_out_channels[-1]
        self.resnets = nnx.List([_resnet(channels, channels, config, rngs) for _ in range(2)])
        attention = config.mid_block_add_attention
        self.attentions = nnx.List([SpatialAttention(channels, config, rngs=rngs)]) if attention else None

    def __call__(self, x: Array, exchange: Exchange) -> Array:
        x = self.resnets[0](x, exchange)
        if self.attentions is not None:
            x = self.attentions[0](x, exchange)
        return self.resnets[1](x, exchange)


class Encoder(nnx.Module):
    """Pixels [b, h, w, 3] to the moments of the latents [b, H, W, 2 * c]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels = config.block_out_channels
        self.conv_in = Conv(config.in_channels, channels[0], rngs=rngs)
        last = len(channels) - 1
        self.down_blocks = nnx.List(
            [
                Level(
                    channels[max(i - 1, 0)],
                    channels[i],
                    config.layers_per_block,
                    "down" if i < last else None,
                    config,
                    rngs=rngs,
                )
                for i in range(len(channels))
            ]
        )
        self.mid_block = VAEMidBlock(config, rngs=rngs)
        self.conv_norm_out = GroupNorm(channels[-1], config.norm_num_groups, 1e-6)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Array, exchange: Exchange) -> Array:
        x = self.conv_in(x, exchange)
        for block in self.down_blocks:
            x = block(x, exchange)
        x = self.mid_block(x, exchange)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x, exchange)), exchange)


class Decoder(nnx.Module):
    """Latents [b, h, w, c] to pixels [b, H, W, 3]."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, channels[0], rngs=rngs)
        self.mid_block = VAEMidBlock(config, rngs=rngs)
        last = len(channels) - 1
        self.up_blocks = nnx.List(
            [
                Level(
                    channels[max(i - 1, 0)],
                    channels[i],
                    config.layers_per_block + 1,
                    "up" if i < last else None,
                    config,
                    rngs=rngs,
                )
                for i in range(len(channels))
            ]
        )
        self.conv_norm_out = GroupNorm(channels[-1], config.norm_num_groups, 1e-6)
        self.conv_out = Conv(channels[-1], config.out_channels, rngs=rngs)

    def __call__(self, x: Array, exchange: Exchange) -> Array:
        x = self.mid_block(self.conv_in(x, exchange), exchange)
        for block in self.up_blocks:
            x = block(x, exchange)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x, exchange)), exchange)


class AutoencoderKL(nnx.Module):
    """diffusers' AutoencoderKL; latents are not scaled by `scaling_factor`, as in its `encode` and `decode`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        latents = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv(2 * latents, 2 * latents, 1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = Conv(latents, latents, 1, rngs=rngs) if config.use_post_quant_conv else None
        name_layers(self)

    def encode(
        self, pixels: Float[Array, "b h w 3"], exchange: Exchange
    ) -> tuple[Float[Array, "b H W c"], Float[Array, "b H W c"]]:
        """Mean and standard deviation of the latents.

        Args:
            pixels: From -1 to 1.
            exchange: Answers for the rest of the image.
        """
        moments = self.encoder(pixels, exchange)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, -1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: Float[Array, "b h w c"], exchange: Exchange) -> Float[Array, "b H W 3"]:
        """Pixels, from about -1 to 1, of latents that are not scaled.

        Args:
            latents: Already divided by `scaling_factor`.
            exchange: How the rows of the other bands are reached.
        """
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents, exchange)


SDXL_VAE = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    scaling_factor=0.13025,
)
"""The VAE of Stable Diffusion XL base 1.0."""
