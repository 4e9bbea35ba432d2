"""Training of the embedded model's UNet together with its text encoders, on cached latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.models.unet import UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.exchange import WholeImage
from distrijax.schedulers import common
from embedded.autoencoder import quiet_residuals
from embedded.caching import batch_of
from embedded.fitting import fit
from embedded.texts import WIDTHS, Texts

UNET = UNetConfig(
    block_out_channels=(64, 128, 160),
    cross_attention_dim=sum(WIDTHS),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(2, 4, 4),
    norm_num_groups=16,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 32,
    sample_size=32,
)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "clip_sample": False,
}
NO_CAPTION = 0.1  # share of captions that are left out, for classifier-free guidance
RATE, BATCH = 1e-3, 32


class Painter(nnx.Module):
    """The UNet and what it reads with."""

    def __init__(self, tokenizers: Sequence[CLIPTokenizer], *, rngs: nnx.Rngs):
        self.texts = Texts(tokenizers, rngs=rngs)
        self.unet = quiet_residuals(UNet(UNET, rngs=rngs))

    def __call__(self, latents: Array, timestep: Array, hidden: Array, pooled: Array, time_ids: Array) -> Array:
        """The velocity at a timestep."""
        return self.unet(latents, timestep, self.unet.condition(hidden, pooled, time_ids), WholeImage())


def cumulative_alphas() -> Float[np.ndarray, "1000"]:
    betas = common.betas(common.BetaSchedule.SCALED_LINEAR, 0.00085, 0.012, 1000)
    return np.asarray(common.cumulative_alphas(betas, rescale_zero_snr=True), np.float32)


def painter_loss(
    painter: Painter, key: Array, latents: Array, ids: Array, ids_2: Array, time_ids: Array, *, dtype=jnp.float32
) -> Array:
    """Squared error of the velocity at a random timestep of a schedule that ends in pure noise (arXiv 2305.08891).

    Some captions are zeroed, as SDXL does for an empty prompt. dtype: what the UNet computes in.
    """
    batch = latents.shape[0]
    noise_key, time_key, caption_key = jax.random.split(key, 3)
    # one timestep in each of `batch` equal ranges: the same expectation as independent draws, with less variance
    spread = (jnp.arange(batch) + jax.random.uniform(time_key, (batch,))) / batch
    timestep = jnp.minimum((1000 * spread).astype(jnp.int32), 999)
    alpha = jnp.asarray(cumulative_alphas())[timestep][:, None, None, None]
    noise = jax.random.normal(noise_key, latents.shape)
    noisy = jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise
    velocity = jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * latents
    hidden, pooled = painter.texts(ids, ids_2)
    kept = (jax.random.uniform(caption_key, (batch,)) >= NO_CAPTION).astype(jnp.float32)
    hidden, pooled = hidden * kept[:, None, None], pooled * kept[:, None]
    guess = painter(
        noisy.astype(dtype), timestep.astype(jnp.float32), hidden.astype(dtype), pooled.astype(dtype), time_ids
    )
    return jnp.mean(jnp.square(guess.astype(jnp.float32) - velocity))


def train_painter(
    painter: Painter, cache: dict[str, dict[str, np.ndarray]], scale: float, *, seed: int, batch: int, **settings: Any
) -> Painter:
    """UNet and text encoders, trained for some minutes more. scale: of latents of unit variance. settings: `fit`'s."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return fit(
        painter,
        partial(painter_loss, dtype=dtype),
        lambda step: batch_of(cache, scale, seed, step, batch),
        learning_rate=RATE,
        average=0.999,
        **settings,
    )


def sample(
    painter: Painter, key: Array, ids: Array, ids_2: Array, time_ids: Array, *, height: int, width: int, guidance: float
) -> Float[Array, "b h w 4"]:
    """Latents of unit variance for each caption, by DDIM of 20 steps with classifier-free guidance."""
    steps = 20
    hidden, pooled = painter.texts(ids, ids_2)
    hidden, pooled = (jnp.concatenate([jnp.zeros_like(value), value]) for value in (hidden, pooled))
    alphas = jnp.asarray(cumulative_alphas())
    batch = len(ids)

    def advance(i: Array, latents: Array) -> Array:
        now = 999 - i * (1000 // steps)
        after = jnp.where(i + 1 < steps, alphas[jnp.maximum(now - 1000 // steps, 0)], 1.0)
        times = jnp.full((2 * batch,), now, jnp.float32)
        both = painter(jnp.concatenate([latents, latents]), times, hidden, pooled, jnp.concatenate([time_ids] * 2))
        without, with_caption = jnp.split(both, 2)
        velocity = without + guidance * (with_caption - without)
        start = jnp.sqrt(alphas[now]) * latents - jnp.sqrt(1 - alphas[now]) * velocity
        noise = jnp.sqrt(alphas[now]) * velocity + jnp.sqrt(1 - alphas[now]) * latents
        return jnp.sqrt(after) * start + jnp.sqrt(1 - after) * noise

    return jax.lax.fori_loop(0, steps, advance, jax.random.normal(key, (batch, height // 8, width // 8, 4)))
