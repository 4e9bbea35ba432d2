"""Latents become pictures: VAE decoding on bands of rows, synchronous and so exact."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from distrijax.parallel.bands import Bands
from distrijax.parallel.exchange import Synchronous
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import CFG, DATA, PATCH
from distrijax.parallel.programs import Params
from distrijax.weights.sharding import ModelLayout


class Decoder(NamedTuple):
    """What the program depends on besides shapes; a static argument of jit."""

    layout: Layout  # of the latents
    vae: ModelLayout
    dtype: Any  # to compute in


def decode(decoder: Decoder, params: Params, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
    """Pixels, about -1 to 1, one image after another.

    Every device of an image has a band, whatever cut the latents; rows and columns beyond the image are for the caller to
    drop.
    """
    layout, form, dtype = decoder
    axes = (PATCH, CFG)
    patches = layout.mesh.shape[PATCH] * layout.mesh.shape[CFG]
    bands = Bands.among(layout.latent[0], patches)
    latents = latents[:, : bands.rows, : layout.latent[1]]
    latents = jnp.pad(latents, ((0, 0), (0, patches * bands.rows_per_device - bands.rows), (0, 0), (0, 0)))

    def local(params, latents):
        vae = form.module(params)
        unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pixels = jax.lax.map(lambda one: vae.decode(one[None], Synchronous(axes, bands))[0], unscaled.astype(dtype))
        return pixels.astype(jnp.float32)

    return jax.shard_map(local, mesh=layout.mesh, in_specs=(form.specs, P(DATA, axes)), out_specs=P(DATA, axes))(
        params, latents
    )
