"""Whether a checkpoint holds the models its configs describe, by names and shapes; no weight is read."""

from __future__ import annotations

from functools import partial

import numpy as np
from flax import nnx

from distrijax.convert.checkpoint import Checkpoint
from distrijax.convert.engine import raise_for
from distrijax.convert.tensors import Shape
from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.layers import abstract
from distrijax.models.unet import UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.weights.names import IGNORED, checkpoint_name, current_name, to_pytorch


def check_complete(checkpoint: Checkpoint, what: str) -> None:
    """Raises one DistriError that lists every tensor that is missing, unexpected or misshapen in the UNet, the VAE and the
    text encoders, and one for a config that is not supported. what: the file, for the error.
    """
    problems: dict[str, list[str]] = {}
    for part, tensors in checkpoint.tensors.items():
        wanted = needed(checkpoint, part)
        if wanted is None:
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
    """Names and shapes that a part's config asks for, with PyTorch's names and layouts; None for what paints no picture."""
    module = _module(checkpoint, part)
    return None if module is None else _shapes(module)


def _module(checkpoint: Checkpoint, part: str) -> nnx.Module | None:
    """A model of shapes."""
    config = checkpoint.configs.get(part, {})
    if part == "unet":
        return abstract(partial(UNet, UNetConfig.from_dict(config)))
    if part == "vae":
        return abstract(partial(AutoencoderKL, VAEConfig.from_dict(config)))
    if part.startswith("text_encoder"):
        projected = (checkpoint.index.get(part) or [None])[-1] == "CLIPTextModelWithProjection"
        return abstract(partial(CLIPTextEncoder, CLIPTextConfig.from_dict(config), with_projection=projected))
    return None


def _shapes(module: nnx.Module) -> dict[str, Shape]:
    return {
        checkpoint_name(path): to_pytorch(path[-1], np.broadcast_to(np.int8(0), leaf.shape)).shape
        for path, leaf in nnx.to_flat_state(nnx.split(module)[1])
    }
