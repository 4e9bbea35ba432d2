"""The embedded model's text encoders, and what teaches them first: telling from a caption what a coarse picture of it shows.

SDXL's text encoders were taught by pictures too, before there was a UNet (CLIP, by contrast). Then they are trained along with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from distrijax.models.attention import Attention
from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.layers import Linear, gelu
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.parallel.exchange import WholeImage
from embedded.artwork import OBJECTS, Artwork
from embedded.autoencoder import to_pixels
from embedded.captions import caption
from embedded.fitting import fit
from embedded.outlines import OUTLINES
from embedded.scene import SIZES, Scene, draw, scene_of

WIDTHS = (96, 160)
CELLS = 8  # along each side of a coarse picture
KINDS = ("", *OBJECTS, *OUTLINES)  # of what a cell may show, the background first
BATCH, RATE = 32, 1e-3


def text_config(tokenizer: CLIPTokenizer, which: int) -> CLIPTextConfig:
    """SDXL's two text encoders in small: quick_gelu without, and gelu with a projection."""
    width = WIDTHS[which]
    return CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        hidden_act=("quick_gelu", "gelu")[which],
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Texts(nnx.Module):
    """Both text encoders."""

    def __init__(self, tokenizers: Sequence[CLIPTokenizer], *, rngs: nnx.Rngs):
        self.text_encoder = CLIPTextEncoder(text_config(tokenizers[0], 0), with_projection=False, rngs=rngs)
        self.text_encoder_2 = CLIPTextEncoder(text_config(tokenizers[1], 1), with_projection=True, rngs=rngs)

    def __call__(self, ids: Int[Array, "b t"], ids_2: Int[Array, "b t"]) -> tuple[Array, Array]:
        """What the UNet is given: token embeddings [b, t, c] of both encoders, and the second's pooled embedding."""
        first, _ = self.text_encoder(ids)
        second, pooled = self.text_encoder_2(ids_2)
        return jnp.concatenate([first, second], -1), pooled


class Reader(nnx.Module):
    """The text encoders under two heads that tell colour and kind of every cell of the picture.

    One attention layer reads the tokens from every cell, as the UNet's cross-attention will; a second head reads the pooled
    embedding.
    """

    def __init__(self, tokenizers: Sequence[CLIPTokenizer], *, rngs: nnx.Rngs):
        width, told = sum(WIDTHS), 3 + len(KINDS)
        self.texts = Texts(tokenizers, rngs=rngs)
        self.cells = nnx.Param(jax.random.normal(rngs.params(), (CELLS * CELLS, width)))
        self.attention = Attention(width, 8, context=width, rngs=rngs)
        self.inner = Linear(width, 2 * width, rngs=rngs)
        self.told = Linear(2 * width, told, rngs=rngs)
        self.pooled_in = Linear(WIDTHS[1], 24 * CELLS * CELLS, rngs=rngs)
        self.pooled_told = Linear(24, told, rngs=rngs)

    def __call__(self, ids: Array, ids_2: Array) -> tuple[Float[Array, "b k c"], Float[Array, "b k c"]]:
        """Colours and kinds of the cells as both heads see them."""
        hidden, pooled = self.texts(ids, ids_2)
        cells = jnp.broadcast_to(self.cells.get_value(), (len(ids), *self.cells.get_value().shape))
        seen = cells + self.attention(cells, WholeImage(), self.attention.project_context(hidden))
        from_pooled = gelu(self.pooled_in(pooled)).reshape(len(ids), CELLS * CELLS, 24)
        return self.told(gelu(self.inner(seen))), self.pooled_told(from_pooled)


def kinds_of_cells(scene: Scene) -> Int[np.ndarray, "k"]:
    """What each cell of a square picture of the scene shows, as an index into KINDS."""
    centres = (np.arange(CELLS) + 0.5) / CELLS
    found = np.zeros((CELLS, CELLS), np.int32)
    for thing in scene.things:
        distance = np.hypot(centres[:, None] - thing.y, centres[None, :] - thing.x)
        reach = 0.8 * thing.radius * SIZES[thing.size]
        found[(distance < reach) | (distance == distance.min())] = KINDS.index(thing.kind)
    return found.reshape(-1)


def lesson(
    step: int, artwork: Artwork, tokenizers: Sequence[CLIPTokenizer], words: tuple[str, ...], seed: int
) -> tuple:
    """A batch: ids for both encoders, colours and kinds of cells."""
    captions, pictures, kinds = [], [], []
    for index in range(step * BATCH, (step + 1) * BATCH):
        scene, rng = scene_of(seed, index)
        captions.append(caption(scene, artwork, rng, words))
        pictures.append(draw(scene, artwork, 64, 64, rng))
        kinds.append(kinds_of_cells(scene))
    colours = to_pixels(pictures).reshape(BATCH, CELLS, 64 // CELLS, CELLS, 64 // CELLS, 3).mean((2, 4))
    return *(tokenizer(captions) for tokenizer in tokenizers), colours.reshape(BATCH, -1, 3), np.stack(kinds)


def reader_loss(reader: Reader, key: Array, ids: Array, ids_2: Array, colours: Array, kinds: Array) -> Array:
    """Squared error of the colours and cross-entropy of the kinds, of both heads."""
    total = jnp.zeros(())
    for told in reader(ids, ids_2):
        total += jnp.mean(jnp.square(told[..., :3] - colours))
        total += 0.3 * jnp.mean(optax.softmax_cross_entropy_with_integer_labels(told[..., 3:], kinds))
    return total


def train_texts(
    reader: Reader,
    artwork: Artwork,
    tokenizers: Sequence[CLIPTokenizer],
    words: tuple[str, ...],
    *,
    seed: int,
    **settings: Any,
) -> Reader:
    """The text encoders under their heads, trained for some minutes more. settings: `fit`'s."""
    batches = partial(lesson, artwork=artwork, tokenizers=tokenizers, words=words, seed=seed)
    return fit(reader, reader_loss, batches, learning_rate=RATE, average=0.995, **settings)
