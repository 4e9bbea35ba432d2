"""A UNet or a VAE from a file that holds it alone or with other models, in the original or in diffusers' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from distrijax.convert.configs import to_json_value
from distrijax.convert.engine import Table, raise_for, to_diffusers
from distrijax.convert.kinds import LATENT_CHANNELS, Kind, recognise, unet_prefix, vae_prefix
from distrijax.convert.layouts.family import DROPPED, Config, without
from distrijax.convert.layouts.original_unet import TIME_COND, UNetLayout, describe_unet, unet_table
from distrijax.convert.layouts.original_vae import describe_vae, levels_of, vae_table
from distrijax.errors import CheckpointError
from distrijax.weights.names import current_name
from distrijax.weights.tensors import Tensors


def unet_from(tensors: Tensors, what: str) -> tuple[Config, Tensors]:
    """A UNet with diffusers' names, and what its shapes imply for its config.

    What they do not imply, such as the number of heads, is as in the model that it is put into. Raises CheckpointError for a file
    without a text-to-image UNet, and for unknown tensors.
    """
    held = _part(tensors, unet_prefix, "UNet", what)
    if "input_blocks.0.0.weight" in held:
        held, _ = to_diffusers(unet_table(UNetLayout.of_source(held, what)) + DROPPED, held, what)
    else:
        _check_known(unet_table(UNetLayout.of_diffusers(held, what)), held, {TIME_COND}, what)
    return {key: to_json_value(value) for key, value in describe_unet(held, what).items()}, held


def vae_from(tensors: Tensors, what: str) -> tuple[Config, Tensors]:
    """A VAE with diffusers' names, and what its shapes imply for its config; not the scaling factor, which the UNet determines.

    Raises CheckpointError for a file without a VAE of four latent channels, and for unknown tensors.
    """
    held = _part(tensors, vae_prefix, "VAE", what)
    if any(name.startswith(("decoder.up.", "decoder.mid.")) for name in held):
        held, _ = to_diffusers(vae_table(levels_of(held)) + DROPPED, held, what)
    else:
        held = {current_name(name): tensor for name, tensor in held.items()}
        _check_known(vae_table(levels_of(held)), held, (), what)
    inferred = describe_vae(held, what)
    if inferred["latent_channels"] != LATENT_CHANNELS:
        raise CheckpointError(
            f"{what} is a VAE of {inferred['latent_channels']} latent channels, as those of Stable Diffusion 3 and Flux; "
            f"give one of {LATENT_CHANNELS}"
        )
    return inferred, held


def _part(tensors: Tensors, prefix_of: Callable[[Tensors], str | None], name: str, what: str) -> Tensors:
    """The tensors of one model, without their prefix."""
    kind, prefix = recognise(tensors, what), prefix_of(tensors)
    if kind in (Kind.LORA, Kind.EMBEDDING) or prefix is None:
        raise CheckpointError(f"{what} is {kind} and holds no {name}; give a file with one")
    return without(tensors, prefix)


def _check_known(table: Table, tensors: Tensors, others: Iterable[str], what: str) -> None:
    """Raises CheckpointError that lists the names that the model does not have."""
    unknown = [name for name in tensors if name not in others and table.from_diffusers(name) is None]
    raise_for({"unknown": unknown} if unknown else {}, what)
