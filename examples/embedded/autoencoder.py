"""Training of the embedded model's autoencoder, for edges."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.parallel.exchange import WholeImage
from embedded.artwork import Artwork
from embedded.fitting import fit
from embedded.perceptual import Weights, lpips
from embedded.scene import draw, scene_of

VAE = VAEConfig(
    block_out_channels=(16, 32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=4,
    force_upcast=False,
)
PERCEPTUAL, EDGES, DIVERGENCE = 0.4, 0.5, 1e-6  # weights of the loss beside the absolute error
RATE = 1e-3
SIDE, BATCH = 96, 4  # of the crops


def new_vae(seed: int) -> AutoencoderKL:
    """An untrained one, whose residual branches add nothing yet and whose latents have little noise."""
    vae = quiet_residuals(AutoencoderKL(VAE, rngs=nnx.Rngs(seed)))
    vae.quant_conv.bias.set_value(jnp.repeat(jnp.array([0.0, -6.0]), VAE.latent_channels))
    return vae


def quiet_residuals(module: nnx.Module) -> nnx.Module:
    """Zeroes the last layer of every residual branch, so that training starts from the plain path through the model."""
    graph, state = nnx.split(module)
    for path, leaf in nnx.to_flat_state(state):
        if ".".join(map(str, path[:-1])).endswith((".conv2", ".proj_out", ".to_out.0", ".ff.net.2")):
            leaf.set_value(jnp.zeros_like(leaf.get_value()))
    return nnx.merge(graph, state)


def widened(vae: AutoencoderKL, seed: int) -> AutoencoderKL:
    """An autoencoder of twice as many channels that gives the same; what comes out of a pair of like channels is split by chance.

    The unequal halves let the two channels of a pair learn different things from then on.
    """
    channels = tuple(2 * count for count in vae.config.block_out_channels)
    wide = AutoencoderKL(dataclasses.replace(vae.config, block_out_channels=channels), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    narrow = dict(nnx.to_flat_state(nnx.split(vae)[1]))
    graph, state = nnx.split(wide)
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(narrow[path].get_value())
        if value.ndim > 1 and leaf.shape[-2] > value.shape[-2]:
            share = np.float32(rng.uniform(0.35, 0.65, value.shape))
            value = np.stack([value * share, value * (1 - share)], -2).reshape(*value.shape[:-2], -1, value.shape[-1])
        if leaf.shape[-1] > value.shape[-1]:
            value = value.repeat(2, -1)
        if ".to_q." in ".".join(map(str, path)):
            value = value * np.float32(0.5**0.5)  # twice as many products in each score
        leaf.set_value(jnp.asarray(value))
    return nnx.merge(graph, state)


def crops(step: int, artwork: Artwork, seed: int, count: int = BATCH) -> Float[np.ndarray, "n h w 3"]:
    """Crops of scenes drawn at 128 to 384, two of each; -1 to 1.

    Four crops in five show part of a thing, for backgrounds fill most of every picture.
    """
    rng = np.random.default_rng([seed, step, 1])
    found: list[np.ndarray] = []
    while len(found) < count:
        scene, drawing = scene_of(seed, int(rng.integers(2**40)))
        size = int(rng.choice([128, 256, 256, 384]))
        pixels = draw(scene, artwork, size, size, drawing)
        for _ in range(2):
            corner = rng.integers(0, size - SIDE + 1, 2)
            if rng.random() < 0.8:
                thing = scene.things[rng.integers(len(scene.things))]
                reach = thing.radius * size
                centre = np.array((thing.y, thing.x)) * size + rng.uniform(-reach, reach, 2)
                corner = np.clip(centre - SIDE / 2, 0, size - SIDE).astype(int)
            y, x = corner
            found.append(pixels[y : y + SIDE, x : x + SIDE])
    return to_pixels(found)


def to_pixels(pictures: list[np.ndarray]) -> Float[np.ndarray, "n h w 3"]:
    """uint8 pictures as the autoencoder takes them, -1 to 1."""
    return np.stack(pictures).astype(np.float32) / 127.5 - 1


def vae_loss(vae: AutoencoderKL, key: Array, pixels: Array, *, perceptual: Weights) -> Array:
    """Absolute error, the absolute error of the differences between neighbours (edges), LPIPS, and a little KL divergence."""
    mean, std = vae.encode(pixels, WholeImage())
    painted = vae.decode(mean + std * jax.random.normal(key, mean.shape), WholeImage())
    error = painted - pixels
    edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std))
    distance = jnp.mean(lpips(perceptual, painted, pixels))
    return jnp.mean(jnp.abs(error)) + EDGES * edges + PERCEPTUAL * distance + DIVERGENCE * divergence


def train_vae(
    vae: AutoencoderKL, artwork: Artwork, perceptual: Weights, *, seed: int, batch: int, **settings: Any
) -> AutoencoderKL:
    """The autoencoder, trained for some minutes more. settings: `fit`'s."""

    def loss(vae: AutoencoderKL, key: Array, pixels: Array) -> Array:
        return vae_loss(vae, key, pixels, perceptual=perceptual)

    batches = partial(_batch, artwork=artwork, seed=seed, count=batch)
    return fit(vae, loss, batches, learning_rate=RATE, average=0.995, **settings)


def _batch(step: int, **settings: Any) -> tuple[np.ndarray]:
    return (crops(step, **settings),)
