"""Replaces the VAE or UNet of a checkpoint, checked against its config and the other parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distrijax.convert.complete import check_complete
from distrijax.convert.configs import compatible, merge_configs, to_json_value
from distrijax.convert.layouts.original_unet import describe_unet
from distrijax.convert.layouts.original_vae import describe_vae
from distrijax.errors import CheckpointError
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import VAEConfig
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.names import current_name
from distrijax.weights.tensors import Tensors

Config = dict[str, Any]

CONFIGS = {"unet": UNetConfig, "vae": VAEConfig}

UNET_NEIGHBOURS = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
)
"""Keys of a UNet's config that the VAE and the text encoders determine."""

VAE_NEIGHBOURS = ("latent_channels", "in_channels", "out_channels")

VAE_OPTIONAL = {"use_quant_conv": True, "use_post_quant_conv": True}
"""Keys of a VAE's config that `describe_vae` names only where the tensors are absent."""

UNET_OPTIONAL = ("addition_embed_type", "projection_class_embeddings_input_dim", "time_cond_proj_dim")
"""Keys of a UNet's config whose value is None without certain tensors."""


def with_vae(
    checkpoint: Checkpoint, tensors: Tensors, what: str, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The checkpoint with another VAE.

    what: the file, for errors. config: of this VAE, a whole config or some of its keys; without it what shapes do not imply,
    above all the scaling factor, is that of the old VAE, since it belongs to the UNet. Raises one CheckpointError that lists every
    tensor that is missing, unexpected or of the wrong shape, and one for a VAE of other latents.
    """
    current = {current_name(name): tensor for name, tensor in tensors.items()}
    inferred = VAE_OPTIONAL | describe_vae(current, what)
    return _replaced(checkpoint, "vae", current, inferred, VAE_NEIGHBOURS, config, what)


def with_unet(
    checkpoint: Checkpoint, tensors: Tensors, what: str, config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The checkpoint with another UNet, as `with_vae`.

    A latent consistency model, which embeds the guidance scale, is recognised by its tensors. What a UNet predicts, noise or v,
    is not; the scheduler's config stays as it is. Raises CheckpointError as `with_vae`, and for one that reads other embeddings.
    """
    inferred = dict.fromkeys(UNET_OPTIONAL) | describe_unet(tensors, what)
    return _replaced(checkpoint, "unet", tensors, inferred, UNET_NEIGHBOURS, config, what)


def _replaced(
    checkpoint: Checkpoint,
    part: str,
    tensors: Tensors,
    inferred: Config,
    neighbours: tuple[str, ...],
    given: Mapping[str, Any] | None,
    what: str,
) -> Checkpoint:
    """inferred: from the shapes. neighbours: keys that must have the same value as in the checkpoint."""
    held = checkpoint.configs.get(part)
    if held is None:
        raise CheckpointError(f"the checkpoint has no {part} that {what} could replace; give a whole pipeline")
    old = CONFIGS[part].from_dict(held)  # which knows the defaults
    for key in neighbours:
        if not compatible(inferred[key], getattr(old, key)):
            raise CheckpointError(
                f"{what}: {key} of its {part} is {to_json_value(inferred[key])} and the model's is {getattr(old, key)}; "
                f"give a {part} that was made for a model of this kind"
            )
    config = merge_configs(part, inferred, held, given or {}, what)
    check_complete(dataclasses.replace(checkpoint, configs={part: config}, tensors={part: tensors}, what=what))
    replaced = checkpoint.with_tensors(part, tensors)
    origins = {**checkpoint.origins, part: what}
    return dataclasses.replace(replaced, configs={**checkpoint.configs, part: config}, origins=origins)
