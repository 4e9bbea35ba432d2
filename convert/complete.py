"""Whether a checkpoint holds the models its configs describe, by names and shapes; no weight is read."""

from __future__ import annotations

from functools import partial

import numpy as np
from flax import nnx

from distrijax.convert.checkpoint import Checkpoint
from distrijax.convert.engine import Problems, raise_for
from distrijax.convert.tensors import Shape
from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.layers import abstract
from distrijax.models.unet import UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.weights.names import IGNORED, checkpoint_name, current_name, to_pytorch


def check_complete(checkpoint: Checkpoint, what: str) -> None:
    """Raises one DistriError that lists every tensor that is missing, unexpected or of the wrong shape in the UNet, the VAE and
    the text encoders, and one for a config that is not supported. what: the file, for the error.
    """
    problems: Problems = {}
    for part, tensors in checkpoint.tensors.items():
        if (wanted := needed(checkpoint, part)) is None:
            continue
        held = {current_name(name): tensor.shape for name, tensor in tensors.items()}
        found = {name: shape for name, shape in held.items() if name not in IGNORED}
        for kind, names in {
            "missing": wanted.keys() - found.keys(),
            "unexpected": found.keys() - wanted.keys(),
            "of the wrong shape": {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]},
        }.items():
            if names:
                problems.setdefault(kind, []).extend(f"{part}.{name}" for name in sorted(names))
    raise_for(problems, what)


def needed(checkpoint: Checkpoint, part: str) -> dict[str, Shape] | None:
    """Names and shapes that a part's config requires, in PyTorch's layout; None for a part that is not a supported model."""
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
    return {
        checkpoint_name(path): to_pytorch(path[-1], np.broadcast_to(np.int8(0), leaf.shape)).shape
        for path, leaf in nnx.to_flat_state(nnx.split(abstract(make))[1])
    }
