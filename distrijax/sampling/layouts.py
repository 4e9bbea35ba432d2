"""The layout of a call's latents, from what the user set and the models' configurations."""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh

from distrijax.config import DistriConfig
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import VAEConfig
from distrijax.parallel.layout import Layout, check_sizes


def layout_of(
    config: DistriConfig, mesh: Mesh | AbstractMesh, unet: UNetConfig, *, guided: bool, latent: tuple[int, int]
) -> Layout:
    """The layout of a call.

    Args:
        config: What the user set.
        mesh: The mesh.
        unet: The UNet's configuration.
        guided: Whether the guidance scale is above 1.
        latent: Rows and columns of the image's latent.
    """
    guided, levels = guided and unet.branches == 2, len(unet.block_out_channels)
    return Layout(mesh, guided, latent, levels, config.parallelism, config.split_scheme)


def image_layout(
    config: DistriConfig,
    mesh: Mesh | AbstractMesh,
    unet: UNetConfig,
    vae: VAEConfig,
    size: tuple[int, int],
    *,
    guided: bool,
) -> Layout:
    """The layout of a call, from the size of its images.

    Args:
        config: What the user set.
        mesh: The mesh.
        unet: The UNet's configuration.
        vae: The VAE's configuration.
        size: Height and width in pixels.
        guided: Whether the guidance scale is above 1.

    Raises:
        InvalidArgument: The image does not have whole rows and columns of the latent.
    """
    check_sizes(height=size[0], width=size[1], vae_scale=vae.scale)
    latent = size[0] // vae.scale, size[1] // vae.scale
    return layout_of(config, mesh, unet, guided=guided, latent=latent)
