"""VAE decoding of latents that are sharded by rows. Exchanges are synchronous, so the result is exact."""

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
from distrijax.parallel.programs import Params, Stage
from distrijax.weights.sharding import ModelLayout


class DecodeSpec(NamedTuple):
    """What the compiled decoder depends on besides shapes; a static argument of jit.

    Attributes:
        layout: The layout of the latents.
        vae: The layout of the VAE's parameters, which are the `params` of the program.
        dtype: The dtype to compute in.
    """

    layout: Layout
    vae: ModelLayout
    dtype: Any


def decode(spec: DecodeSpec, params: Params, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
    """Decodes images one after another. Every device of an image decodes a band of rows, however the latents are sharded.

    Args:
        spec: What is static.
        params: The VAE's parameters.
        latents: Latents, padding included.

    Returns:
        Pixels, from about -1 to 1, float32. The caller removes the rows and columns of the padding.
    """
    layout, vae_layout, dtype = spec
    axes = (PATCH, CFG)
    patches = layout.mesh.shape[PATCH] * layout.mesh.shape[CFG]
    bands = Bands.among(layout.latent[0], patches)
    latents = latents[:, : bands.rows, : layout.latent[1]]
    latents = jnp.pad(latents, ((0, 0), (0, patches * bands.rows_per_device - bands.rows), (0, 0), (0, 0)))

    def local(params, latents):
        vae = vae_layout.module(params)
        unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pixels = jax.lax.map(lambda one: vae.decode(one[None], Synchronous(axes, bands))[0], unscaled.astype(dtype))
        return pixels.astype(jnp.float32)

    return jax.shard_map(local, mesh=layout.mesh, in_specs=(vae_layout.specs, P(DATA, axes)), out_specs=P(DATA, axes))(
        params, latents
    )


DECODE = Stage(decode)
