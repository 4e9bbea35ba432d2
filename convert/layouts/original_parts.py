"""A UNet or a VAE out of a file that holds it alone or with others, in the original or in diffusers' naming."""

from __future__ import annotations

from collections.abc import Iterable

from distrijax.convert.configs import to_json_value
from distrijax.convert.engine import Table, raise_for, to_diffusers
from distrijax.convert.kinds import LATENT_CHANNELS, Kind, recognise, unet_prefix, vae_prefix
from distrijax.convert.layouts.family import DROPPED, Config, without
from distrijax.convert.layouts.original_unet import TIME_COND, UNetLayout, describe_unet, unet_table
from distrijax.convert.layouts.original_vae import describe_vae, levels_of, vae_table
from distrijax.convert.tensors import Tensors
from distrijax.errors import DistriError
from distrijax.weights.names import current_name


def unet_from(tensors: Tensors, what: str) -> tuple[Config, Tensors]:
    """A UNet with diffusers' names, and what its shapes tell of its config.

    The config is to be laid over that of the model it goes into, which has what shapes do not tell, such as the number of
    heads. Latent consistency models are told by `time_cond_proj_dim`.
    Raises DistriError for a file without a UNet that paints from text, and for unknown tensors.
    """
    kind = recognise(tensors, what)
    prefix = unet_prefix(tensors)
    if kind in (Kind.LORA, Kind.EMBEDDING) or prefix is None:
        raise DistriError(f"{what} is {kind} and holds no UNet; give a file with one")
    held = without(tensors, prefix)
    if "input_blocks.0.0.weight" in held:
        ours, _ = to_diffusers(unet_table(UNetLayout.of_source(held, what)) + DROPPED, held, what)
    else:
        ours = held
        _check_known(unet_table(UNetLayout.of_diffusers(ours, what)), ours, {TIME_COND}, what)
    return {key: to_json_value(value) for key, value in describe_unet(ours, what).items()}, ours


def vae_from(tensors: Tensors, what: str) -> tuple[Config, Tensors]:
    """A VAE with diffusers' names, and what its shapes tell of its config.

    The config is to be laid over that of the model it goes into, which has the scaling factor: it belongs to the UNet.
    Raises DistriError for a file without a VAE of four latent channels, and for unknown tensors.
    """
    kind = recognise(tensors, what)
    prefix = vae_prefix(tensors)
    if kind in (Kind.LORA, Kind.EMBEDDING) or prefix is None:
        raise DistriError(f"{what} is {kind} and holds no VAE; give a file with one")
    held = without(tensors, prefix)
    if any(name.startswith(("decoder.up.", "decoder.mid.")) for name in held):
        ours, _ = to_diffusers(vae_table(levels_of(held)) + DROPPED, held, what)
    else:
        ours = {current_name(name): tensor for name, tensor in held.items()}
        _check_known(vae_table(levels_of(ours)), ours, (), what)
    told = describe_vae(ours, what)
    if told["latent_channels"] != LATENT_CHANNELS:
        raise DistriError(
            f"{what} is a VAE of {told['latent_channels']} latent channels, as those of Stable Diffusion 3 and Flux; "
            f"give one of {LATENT_CHANNELS}"
        )
    return told, ours


def _check_known(table: Table, ours: Tensors, others: Iterable[str], what: str) -> None:
    """Raises DistriError that lists the names that the model does not have."""
    unknown = [name for name in ours if name not in others and table.from_diffusers(name) is None]
    raise_for({"unknown": unknown} if unknown else {}, what)
