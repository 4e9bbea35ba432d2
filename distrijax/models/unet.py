"""The SDXL UNet: diffusers' UNet2DConditionModel for the configurations of the Stable Diffusion XL family.

The module tree has diffusers' names. What depends on the prompt alone (cross-attention keys and values, the embedding of
the pooled text and of the sizes) is computed once, by `condition`, before the denoising loop; what the timesteps alone add to that
(each resnet's projection of the time embedding) by `times`, for all steps of a program; `predict` is what remains of a call.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distrijax.config import DistriError, ModelConfig, check_choice, per_block, positive
from distrijax.exchange import Exchange, KeysValues
from distrijax.layers import (
    Attention,
    Conv,
    Cut,
    GroupNorm,
    LayerNorm,
    Linear,
    Side,
    abstract,
    gelu,
    name_layers,
    sinusoidal,
    upsample_nearest,
)


@dataclasses.dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """The keys of a UNet's config.json that shape it; see diffusers' UNet2DConditionModel for their meaning.

    As there, `attention_head_dim` is, for historical reasons, the *number* of heads unless `num_attention_heads` is set.
    """

    block_out_channels: tuple[int, ...]
    cross_attention_dim: int | tuple[int, ...]
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] | None = None
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: float = 0

    INERT = frozenset({"dropout", "upcast_attention"})  # attention scores are always float32
    FIXED = {
        "act_fn": ("silu", "swish"),
        "addition_embed_type_num_heads": (64,),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False, None),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }

    def __post_init__(self):
        blocks = len(self.block_out_channels)
        for types, cross, plain in (
            (self.down_block_types, "CrossAttnDownBlock2D", "DownBlock2D"),
            (self.up_block_types, "CrossAttnUpBlock2D", "UpBlock2D"),
        ):
            per_block(types, blocks, "block types")
            for kind in types:
                check_choice(kind, (cross, plain), "UNetConfig: block type")
        check_choice(self.addition_embed_type, (None, "text_time"), "UNetConfig: addition_embed_type")
        if self.addition_embed_type and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise DistriError(
                "UNetConfig: addition_embed_type 'text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim; add them to the config"
            )
        if self.time_cond_proj_dim is not None:
            positive(self.time_cond_proj_dim, "UNetConfig: time_cond_proj_dim", least=4)
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % self.norm_num_groups or channels % heads:
                raise DistriError(
                    f"UNetConfig: {channels} channels do not divide into {self.norm_num_groups} groups and {heads} heads; "
                    "correct block_out_channels, norm_num_groups or attention_head_dim"
                )

    @property
    def branches(self) -> int:
        """How many branches guidance has: one where the model is told the scale (`time_cond_proj_dim`), as LCM's are, else two."""
        return 2 if self.time_cond_proj_dim is None else 1

    @property
    def heads(self) -> tuple[int, ...]:
        return per_block(self.num_attention_heads or self.attention_head_dim, len(self.block_out_channels), "heads")

    def depth(self, block: int) -> int:
        return per_block(self.layers_per_block, len(self.block_out_channels), "layers_per_block")[block]

    def transformer_depth(self, block: int) -> int:
        layers = per_block(self.transformer_layers_per_block, len(self.block_out_channels), "transformer layers")
        return layers[block]

    def context(self, block: int) -> int:
        return per_block(self.cross_attention_dim, len(self.block_out_channels), "cross_attention_dim")[block]


class Conditioning(NamedTuple):
    """What the prompt, the sizes and the guidance scale say to the UNet, constant over the denoising steps.

    context: keys and values of each cross-attention, by its path, [b, t, c] each.
    embedding: added to the time embedding, [b, 4 * channels], or None without `text_time`.
    guidance: added to the sinusoids of the timestep, [b, channels], or None for a model that is not told the scale.
    """

    context: dict[str, KeysValues]
    embedding: Array | None
    guidance: Array | None = None


Times = dict[str, Array]
"""What each resnet adds to its features at a timestep, by its path, [b, c] each."""


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between them; condition: features of what `cond_proj` lets the caller add to the input."""

    def __init__(self, features_in: int, features: int, *, condition: int | None = None, rngs: nnx.Rngs):
        self.cond_proj = Linear(condition, features_in, bias=False, rngs=rngs) if condition else None
        self.linear_1 = Linear(features_in, features, rngs=rngs)
        self.linear_2 = Linear(features, features, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """Two normalised 3x3 convolutions around the time embedding; `time` None leaves it out (VAE)."""

    def __init__(self, channels_in, channels_out, *, time: int | None, groups: int, eps: float, rngs: nnx.Rngs):
        inner = Cut(Side.OUTPUT, channels_out // groups)
        self.norm1 = GroupNorm(channels_in, groups, eps)
        self.conv1 = Conv(channels_in, channels_out, cut=inner, rngs=rngs)
        self.time_emb_proj = Linear(time, channels_out, cut=inner, rngs=rngs) if time else None
        self.norm2 = GroupNorm(channels_out, groups, eps, cut=inner)
        self.conv2 = Conv(channels_out, channels_out, cut=Cut(Side.INPUT, inner.unit), rngs=rngs)
        self.conv_shortcut = Conv(channels_in, channels_out, 1, rngs=rngs) if channels_in != channels_out else None
        self.path = ""

    def project_time(self, embedding: Float[Array, "b t"]) -> Float[Array, "b C"]:
        """The embedding as a call adds it; with tensor parallelism this device's channels of it."""
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
    """Gated GELU: one projection, one half gates the other."""

    def __init__(self, channels: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = Linear(channels, 2 * inner, cut=Cut(Side.OUTPUT, parts=2), rngs=rngs)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... i"]:
        value, gate = jnp.split(self.proj(x), 2, -1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """GEGLU and a projection back; `net.1` is diffusers' dropout and has no parameters."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        last = Linear(4 * channels, channels, cut=Cut(Side.INPUT), rngs=rngs)
        self.net = nnx.List([GEGLU(channels, 4 * channels, rngs=rngs), None, last])

    def __call__(self, x: Float[Array, "... c"], exchange: Exchange) -> Float[Array, "... c"]:
        return self.net[2](self.net[0](x), exchange)


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each normalised first and added."""

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
    """Transformer blocks over the pixels of a band of rows, in raster order."""

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
        # a linear layer and a 1x1 convolution are the same map
        inner = self.proj_in(self.norm(x, exchange))
        for block in self.transformer_blocks:
            inner = block(inner, exchange, context)
        return x + self.proj_out(inner)


class Downsample2D(nnx.Module):
    """3x3 convolution of stride 2."""

    def __init__(self, channels: int, *, trailing: bool = False, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, trailing=trailing, cut=Cut(Side.INPUT), rngs=rngs)

    def __call__(self, x: Array, exchange: Exchange) -> Array:
        return self.conv(x, exchange)


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, cut=Cut(Side.INPUT), rngs=rngs)

    def __call__(self, x: Array, exchange: Exchange, size: tuple[int, int] | None = None) -> Array:
        """`size`: height and width of the result, where the level above has one row or column less than twice as many."""
        height, width = size or (None, None)
        return self.conv(upsample_nearest(x)[:, :height, :width], exchange)


class Block(nnx.Module):
    """One level: resnets, each followed by a transformer where the level has them, then a sampler.

    channels: input channels of each resnet; all give `config.block_out_channels[level]`.
    """

    def __init__(self, config: UNetConfig, level: int, channels: list[int], *, attention: bool, rngs: nnx.Rngs):
        out, time = config.block_out_channels[level], 4 * config.block_out_channels[0]
        settings = dict(time=time, groups=config.norm_num_groups, eps=config.norm_eps, rngs=rngs)
        self.resnets = nnx.List([ResnetBlock2D(c, out, **settings) for c in channels])
        depth = config.transformer_depth(level)
        self.attentions = (
            nnx.List([Transformer2DModel(config, level, depth, rngs=rngs) for _ in channels]) if attention else None
        )

    def layer(self, i: int, x: Array, exchange: Exchange, times: Times, context: dict[str, KeysValues]) -> Array:
        x = self.resnets[i](x, exchange, times[self.resnets[i].path])
        return x if self.attentions is None else self.attentions[i](x, exchange, context)


class DownBlock(Block):
    """Resnets (and transformers), then, except at the deepest level, a downsampling; every output is a skip."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs):
        out = config.block_out_channels[level]
        first = config.block_out_channels[max(level - 1, 0)]
        attention = config.down_block_types[level].startswith("CrossAttn")
        super().__init__(config, level, [first] + [out] * (config.depth(level) - 1), attention=attention, rngs=rngs)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = None if last else nnx.List([Downsample2D(out, rngs=rngs)])

    def __call__(self, x: Array, exchange: Exchange, times: Times, context: dict[str, KeysValues]) -> list[Array]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, exchange, times, context)
            skips.append(x)
        if self.downsamplers is not None:
            skips.append(self.downsamplers[0](x, exchange))
        return skips


class UpBlock(Block):
    """Resnets (and transformers) that take the skips back in, then, except at the first level, an upsampling."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs):
        channels = config.block_out_channels
        # the skips of this level, deepest last: its resnets', and the output of the level above (conv_in at the top)
        skips = [channels[level]] * config.depth(level) + [channels[max(level - 1, 0)]]
        below = channels[min(level + 1, len(channels) - 1)]
        inputs = [below] + [channels[level]] * (len(skips) - 1)
        attention = config.up_block_types[len(channels) - 1 - level].startswith("CrossAttn")
        widths = [i + s for i, s in zip(inputs, skips, strict=True)]
        super().__init__(config, level, widths, attention=attention, rngs=rngs)
        self.upsamplers = None if level == 0 else nnx.List([Upsample2D(channels[level], rngs=rngs)])

    def __call__(
        self, x: Array, skips: list[Array], exchange: Exchange, times: Times, context: dict[str, KeysValues]
    ) -> Array:
        for i in range(len(self.resnets)):
            x = self.layer(i, jnp.concatenate([x, skips.pop()], -1), exchange, times, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, exchange, skips[-1].shape[1:3])


class MidBlock(nnx.Module):
    """Resnet, transformer, resnet at the deepest level."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        level = len(config.block_out_channels) - 1
        channels, time = config.block_out_channels[level], 4 * config.block_out_channels[0]
        settings = dict(time=time, groups=config.norm_num_groups, eps=config.norm_eps, rngs=rngs)
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, **settings) for _ in range(2)])
        depth = config.transformer_depth(level)
        self.attentions = nnx.List([Transformer2DModel(config, level, depth, rngs=rngs)])

    def __call__(self, x: Array, exchange: Exchange, times: Times, context: dict[str, KeysValues]) -> Array:
        before, after = self.resnets
        x = before(x, exchange, times[before.path])
        x = self.attentions[0](x, exchange, context)
        return after(x, exchange, times[after.path])


class UNet(nnx.Module):
    """Predicts the noise (or velocity) in a band of rows of the latents; agrees with diffusers' UNet2DConditionModel."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, levels = config.block_out_channels, range(len(config.block_out_channels))
        time = 4 * channels[0]
        self.conv_in = Conv(config.in_channels, channels[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(channels[0], time, condition=config.time_cond_proj_dim, rngs=rngs)
        added = config.projection_class_embeddings_input_dim if config.addition_embed_type else None
        self.add_embedding = TimestepEmbedding(added, time, rngs=rngs) if added else None
        self.down_blocks = nnx.List([DownBlock(config, i, rngs=rngs) for i in levels])
        self.mid_block = MidBlock(config, rngs=rngs)
        self.up_blocks = nnx.List([UpBlock(config, i, rngs=rngs) for i in reversed(levels)])
        self.conv_norm_out = GroupNorm(channels[0], config.norm_num_groups, config.norm_eps)
        self.conv_out = Conv(channels[0], config.out_channels, cut=Cut(Side.INPUT), rngs=rngs)
        name_layers(self)

    def condition(
        self,
        encoder_hidden_states: Float[Array, "b t e"],
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Float[Array, "b i"] | None = None,
        guidance_scale: Float[Array, "b"] | None = None,
        exchange: Exchange | None = None,
    ) -> Conditioning:
        """Everything that does not change from step to step.

        text_embeds: pooled text embedding. time_ids: SDXL's micro-conditioning (original size, crop, target size),
        in pixels; both only for models with `addition_embed_type` "text_time". guidance_scale: only for models with
        `time_cond_proj_dim`; None tells them nothing of it. exchange: where devices hold parts of the cross-attentions'
        projections.
        """
        context = {}
        for attention in (block.attn2 for block in self._transformer_blocks()):
            kv = attention.project_context(encoder_hidden_states)
            if exchange is not None:
                kv = tuple(exchange.context(part, attention.channels) for part in kv)
            context[attention.path] = kv
        embedding = None if self.add_embedding is None else self._added(text_embeds, time_ids)
        guidance = None
        if guidance_scale is not None:
            told = guidance_embedding(guidance_scale, self.config.time_cond_proj_dim)
            guidance = self.time_embedding.cond_proj(told.astype(encoder_hidden_states.dtype))
        return Conditioning(context, embedding, guidance)

    def _added(self, text_embeds: Float[Array, "b p"], time_ids: Float[Array, "b i"]) -> Float[Array, "b o"]:
        b, ids = time_ids.shape
        sizes = self._sinusoidal(time_ids.reshape(-1), self.config.addition_time_embed_dim).reshape(b, -1)
        added = jnp.concatenate([text_embeds, sizes.astype(text_embeds.dtype)], -1)
        if added.shape[-1] != self.config.projection_class_embeddings_input_dim:
            raise DistriError(
                f"{ids} time ids and a pooled embedding of {text_embeds.shape[-1]} make {added.shape[-1]} features; the "
                f"UNet takes {self.config.projection_class_embeddings_input_dim}; check the second text encoder"
            )
        return self.add_embedding(added)

    def times(self, timestep: Float[Array, "b"], conditioning: Conditioning, dtype: jnp.dtype) -> Times:
        """Everything that depends on the timestep but not on the sample. timestep: as for a call, one each."""
        features = self._sinusoidal(timestep, self.config.block_out_channels[0]).astype(dtype)
        if conditioning.guidance is not None:
            features = features + conditioning.guidance
        embedding = self.time_embedding(features)
        if conditioning.embedding is not None:
            embedding = embedding + conditioning.embedding
        return {resnet.path: resnet.project_time(embedding) for block in self._blocks() for resnet in block.resnets}

    def predict(
        self,
        sample: Float[Array, "b h w c"],
        times: Times,
        context: dict[str, KeysValues],
        exchange: Exchange,
    ) -> Float[Array, "b h w o"]:
        """The model's prediction for a band of rows, in the dtype of `sample`. times, context: of `times` and `condition`."""
        x = self.conv_in(sample, exchange.exact())
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], exchange, times, context)
        x = self.mid_block(skips[-1], exchange, times, context)
        for block in self.up_blocks:
            x = block(x, skips, exchange, times, context)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x, exchange)), exchange)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Float[Array, ""] | Float[Array, "b"],
        conditioning: Conditioning,
        exchange: Exchange,
    ) -> Float[Array, "b h w o"]:
        """`predict` at a timestep.

        timestep: of the training schedule (0 to 999), fractions allowed; one for all, or one each.
        """
        times = self.times(jnp.broadcast_to(timestep, sample.shape[:1]), conditioning, sample.dtype)
        return self.predict(sample, times, conditioning.context, exchange)

    def _sinusoidal(self, values: Array, size: int) -> Array:
        return sinusoidal(
            values, size, flip_sin_to_cos=self.config.flip_sin_to_cos, shift=float(self.config.freq_shift)
        )

    def _blocks(self) -> list[Block | MidBlock]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def _transformer_blocks(self) -> list[BasicTransformerBlock]:
        transformers = [t for block in self._blocks() for t in block.attentions or ()]
        return [block for transformer in transformers for block in transformer.transformer_blocks]


def guidance_embedding(scale: Float[Array, "b"], size: int) -> Float[Array, "b {size}"]:
    """Sinusoids of guidance scales, float32; agrees with diffusers' get_guidance_scale_embedding of scale - 1."""
    return sinusoidal(1000 * (scale - 1), size, flip_sin_to_cos=False, shift=1.0)


SDXL_BASE = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
"""Stable Diffusion XL base 1.0's."""


def abstract_unet(config: UNetConfig) -> UNet:
    """A UNet of shapes without values."""
    return abstract(partial(UNet, config))
