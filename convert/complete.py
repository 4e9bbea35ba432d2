"""Whether a checkpoint holds the models its configs describe, by names and shapes; no weight is read."""

from __future__ import annotations

from functools import partial

from flax import nnx

from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.layers import abstract
from distrijax.models.unet import UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.load import check_tensors
from distrijax.weights.names import ParamPath, current_name
from distrijax.weights.tensors import Shape


def check_complete(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError that lists every tensor that is missing, unexpected or of the wrong shape or type in the first of
    the models where there are any, and one for a config that is not supported.
    """
    for part, tensors in checkpoint.tensors.items():
        if (params := params_of(checkpoint, part)) is not None:
            held = {current_name(name): tensor for name, tensor in tensors.items()}
            check_tensors(held, params, f"{checkpoint.what}: {part}")


def params_of(checkpoint: Checkpoint, part: str) -> list[tuple[ParamPath, Shape]] | None:
    """The parameters that a part's config requires, and their shapes; None for a part that is not a supported model."""
    config = checkpoint.configs.get(part, {})
    if part == "unet":
        make = partial(UNet, UNetConfig.from_dict(config))
    elif part == "vae":
        make = partial(AutoencoderKL, VAEConfig.from_dict(config))
    elif part.startswith("text_encoder"):
        projected = (checkpoint.index.get(part) or [None])[-1] == "CLIPTextModelWithProjection"
        make = partial(CLIPTextEncoder, CLIPTextConfig.from_dict(config), with_projection=projected)
    else:
        return None
    return [(path, leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(abstract(make)))]
