"""The UNet: diffusers' UNet2DConditionModel, for the configurations of Stable Diffusion 1.x, 2.x and XL.

The module tree has diffusers' names. A call is divided by what its parts depend on:

    condition   the prompt: keys and values of cross-attention, embedding of pooled text and sizes; once, before the loop
    times       the timestep: what each resnet adds to its features; for all steps of a program at once
    predict     the latents: everything else, at every step

`predict` is put together of five parts, which other predictors may put together differently:

    enter       latents -> the first skips, at the full size            | the outermost layers
    encode      the way down: the first skips -> all skips              }
    middle      the deepest skip -> features                            } the deep part
    decode      the way up, which takes the skips from the last on      }
    leave       the last layers, which take the first skips -> output   | the outermost layers
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distrijax.errors import CheckpointError
from distrijax.models.blocks import (
    BasicTransformerBlock,
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
)
from distrijax.models.layers import (
    Conv,
    GroupNorm,
    TPKind,
    TPSpec,
    abstract,
    name_layers,
    sinusoidal,
)
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.collectives import KeysValues
from distrijax.parallel.exchange import Exchange


class Conditioning(NamedTuple):
    """What the UNet computes of prompt, sizes and guidance scale, which are constant over the denoising steps.

    Attributes:
        context: Keys and values of each cross-attention, by its path, [b, t, c] each.
        embedding: Added to the time embedding, [b, 4 * channels]; None without `text_time`.
        guidance: Added to the sinusoids of the timestep, [b, channels]; None for a model that is not conditioned on the
            guidance scale.
    """

    context: dict[str, KeysValues]
    embedding: Array | None
    guidance: Array | None = None


Times = dict[str, Array]
"""The projected time embedding that each resnet adds to its features, by its path, [b, c] each."""


class Block(nnx.Module):
    """Resnets of one level, each followed by a transformer where the level has attention.

    Args:
        config: The UNet's.
        level: Index of the level, from the outermost.
        channels: Input channels of each resnet; all have `config.block_out_channels[level]` output channels.
        attention: Whether the level has transformers.
        rngs: Keys of the initial values.
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
        """The i-th resnet, and its transformer."""
        x = self.resnets[i](x, exchange, times[self.resnets[i].path])
        return x if self.attentions is None else self.attentions[i](x, exchange, context)


class DownBlock(Block):
    """`Block`, then downsampling except at the deepest level."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs):
        out = config.block_out_channels[level]
        first = config.block_out_channels[max(level - 1, 0)]
        attention = config.down_block_types[level].startswith("CrossAttn")
        super().__init__(config, level, [first] + [out] * (config.depth(level) - 1), attention=attention, rngs=rngs)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = None if last else nnx.List([Downsample2D(out, rngs=rngs)])

    def __call__(
        self,
        x: Array,
        exchange: Exchange,
        times: Times,
        context: dict[str, KeysValues],
        start: int = 0,
        stop: int | None = None,
    ) -> list[Array]:
        """The output of each layer from `start` to before `stop` (None: of all that follow, downsampling included)."""
        skips = []
        for i in range(start, len(self.resnets) if stop is None else stop):
            x = self.layer(i, x, exchange, times, context)
            skips.append(x)
        if self.downsamplers is not None and stop is None:
            skips.append(self.downsamplers[0](x, exchange))
        return skips


class UpBlock(Block):
    """`Block` with a skip concatenated to the input of each resnet, then upsampling except at the outermost level."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs):
        channels = config.block_out_channels
        # in the order they are taken: the outputs of this level's resnets, then of the level above (conv_in at the top)
        skips = [channels[level]] * config.depth(level) + [channels[max(level - 1, 0)]]
        below = channels[min(level + 1, len(channels) - 1)]
        inputs = [below] + [channels[level]] * (len(skips) - 1)
        attention = config.up_block_types[len(channels) - 1 - level].startswith("CrossAttn")
        widths = [i + s for i, s in zip(inputs, skips, strict=True)]
        super().__init__(config, level, widths, attention=attention, rngs=rngs)
        self.upsamplers = None if level == 0 else nnx.List([Upsample2D(channels[level], rngs=rngs)])

    def __call__(
        self,
        x: Array,
        skips: list[Array],
        exchange: Exchange,
        times: Times,
        context: dict[str, KeysValues],
        start: int = 0,
        stop: int | None = None,
    ) -> Array:
        """Layers from `start` to before `stop` (None: all that follow), each of which takes the last of `skips`."""
        for i in range(start, len(self.resnets) if stop is None else stop):
            x = self.layer(i, jnp.concatenate([x, skips.pop()], -1), exchange, times, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, exchange, skips[-1].shape[1:3])


class MidBlock(nnx.Module):
    """Resnet, transformer and resnet at the deepest level."""

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
    """Predicts the noise, or the velocity, of a band of rows of the latents; agrees with diffusers' UNet2DConditionModel."""

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
        self.conv_out = Conv(channels[0], config.out_channels, tp=TPSpec(TPKind.ROW), rngs=rngs)
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

        Args:
            encoder_hidden_states: Token embeddings.
            text_embeds: Pooled text embedding; for models with `addition_embed_type` "text_time" only.
            time_ids: SDXL's micro-conditioning (original size, crop, target size), in pixels; for the same models only.
            guidance_scale: For models with `time_cond_proj_dim` only; None leaves the guidance scale out.
            exchange: Gathers the keys and values, where their projections are sharded by channels; None where they are not.
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
            features = guidance_embedding(guidance_scale, self.config.time_cond_proj_dim)
            guidance = self.time_embedding.cond_proj(features.astype(encoder_hidden_states.dtype))
        return Conditioning(context, embedding, guidance)

    def _added(self, text_embeds: Float[Array, "b p"], time_ids: Float[Array, "b i"]) -> Float[Array, "b o"]:
        b, ids = time_ids.shape
        sizes = self._sinusoidal(time_ids.reshape(-1), self.config.addition_time_embed_dim).reshape(b, -1)
        added = jnp.concatenate([text_embeds, sizes.astype(text_embeds.dtype)], -1)
        if added.shape[-1] != self.config.projection_class_embeddings_input_dim:
            raise CheckpointError(
                f"{ids} time ids and a pooled embedding of {text_embeds.shape[-1]} make {added.shape[-1]} features; the "
                f"UNet takes {self.config.projection_class_embeddings_input_dim}; check the second text encoder"
            )
        return self.add_embedding(added)

    def times(self, timestep: Float[Array, "b"], conditioning: Conditioning, dtype: jnp.dtype) -> Times:
        """Everything that depends on the timestep but not on the latents.

        Args:
            timestep: Of the training schedule (0 to 999), fractions allowed.
            conditioning: Of `condition`.
            dtype: To compute in.
        """
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
        """The prediction for a band of rows, in the dtype of `sample`.

        Args:
            sample: The band's latents, scaled as the scheduler says.
            times: Of `times`.
            context: `Conditioning.context`.
            exchange: Answers for the rest of the image.
        """
        skips = self.encode(self.enter(sample, times, context, exchange), times, context, exchange)
        x = self.middle(skips[-1], times, context, exchange)
        first, rest = skips[:1], skips[1:]
        x = self.decode(x, rest, times, context, exchange)
        return self.leave(x, first, times, context, exchange)

    def enter(
        self,
        sample: Float[Array, "b h w c"],
        times: Times,
        context: dict[str, KeysValues],
        exchange: Exchange,
        outer: int = 1,
    ) -> list[Float[Array, "b h w C"]]:
        """The outermost layers of the way down: `conv_in`, which reads fresh values of the other bands, and those after it.

        Args:
            sample: As in `predict`.
            times: As in `predict`.
            context: As in `predict`.
            exchange: As in `predict`.
            outer: How many layers, `conv_in` included; at most as many as the outermost level has resnets on the way down.

        Returns:
            The layers' outputs, which are the first skips.
        """
        skips = [self.conv_in(sample, exchange.exact())]
        return skips + self.down_blocks[0](skips[0], exchange, times, context, stop=outer - 1)

    def encode(
        self, skips: list[Array], times: Times, context: dict[str, KeysValues], exchange: Exchange
    ) -> list[Array]:
        """The rest of the way down.

        Args:
            skips: Of `enter`. They may be of another size than the latents; the deep part then has that size.
            times: As in `predict`.
            context: As in `predict`.
            exchange: As in `predict`; of bands of the skips' size.

        Returns:
            All skips, the deepest last.
        """
        skips, start = list(skips), len(skips) - 1
        for block in self.down_blocks:
            skips += block(skips[-1], exchange, times, context, start)
            start = 0
        return skips

    def middle(self, x: Array, times: Times, context: dict[str, KeysValues], exchange: Exchange) -> Array:
        """The block at the deepest level; arguments as in `encode`, `x` the deepest skip."""
        return self.mid_block(x, exchange, times, context)

    def decode(
        self, x: Array, skips: list[Array], times: Times, context: dict[str, KeysValues], exchange: Exchange
    ) -> Float[Array, "b h w C"]:
        """The way up, as far as the skips reach: the layers that take the others are `leave`'s.

        Args:
            x: Of `middle`.
            skips: Of `encode`, without those of `enter`.
            times: As in `predict`.
            context: As in `predict`.
            exchange: As in `encode`.
        """
        skips = list(skips)
        for block in self.up_blocks[:-1]:
            x = block(x, skips, exchange, times, context)
        return self.up_blocks[-1](x, skips, exchange, times, context, stop=len(skips))

    def leave(
        self, x: Array, skips: list[Array], times: Times, context: dict[str, KeysValues], exchange: Exchange
    ) -> Float[Array, "b h w o"]:
        """The outermost layers of the way up, and the output.

        Args:
            x: Of `decode`, in the size of the latents.
            skips: Of `enter`.
            times: As in `predict`.
            context: As in `predict`.
            exchange: As in `predict`.
        """
        last = self.up_blocks[-1]
        x = last(x, list(skips), exchange, times, context, start=len(last.resnets) - len(skips))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x, exchange)), exchange)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Float[Array, ""] | Float[Array, "b"],
        conditioning: Conditioning,
        exchange: Exchange,
    ) -> Float[Array, "b h w o"]:
        """`predict` at a timestep of the training schedule (0 to 999, fractions allowed): one for all images, or one each."""
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
    """Sinusoidal embedding of guidance scales, float32, as diffusers' `get_guidance_scale_embedding` of scale - 1."""
    return sinusoidal(1000 * (scale - 1), size, flip_sin_to_cos=False, shift=1.0)


def abstract_unet(config: UNetConfig) -> UNet:
    """A UNet of shapes without values."""
    return abstract(partial(UNet, config))
