"""Comparing with torch diffusers: weights carried over, layouts, and how far apart two results are."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from distrijax.weights.names import checkpoint_name, to_native

Module = TypeVar("Module", bound=nnx.Module)


def disturb(module: torch.nn.Module) -> torch.nn.Module:
    """Moves biases and the scales of norms away from 0 and 1, which would hide that they are not used."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


def port(module: Module, source: torch.nn.Module) -> Module:
    """`module` with the weights of `source`; every tensor has to be used."""
    tensors = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    for path, parameter in nnx.to_flat_state(nnx.state(module)):
        value = to_native(path[-1], tensors.pop(checkpoint_name(path)))
        assert value.shape == parameter.shape
        parameter.set_value(jnp.asarray(value))
    assert sorted(tensors) == []
    return module


def record(model: torch.nn.Module, *arguments: Any, **keywords: Any) -> dict[str, tuple[dict[str, Any], Any]]:
    """Runs a model: the arguments and the result of every part of it, by path."""
    seen: dict[str, tuple[dict[str, Any], Any]] = {}

    def keep(path: str):
        def hook(module, args, kwargs, output):
            seen[path] = (dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments), output)

        return hook

    hooks = [part.register_forward_hook(keep(path), with_kwargs=True) for path, part in model.named_modules()]
    with torch.no_grad():
        model(*arguments, **keywords)
    for hook in hooks:
        hook.remove()
    return seen


def part(module: nnx.Module, path: str) -> nnx.Module:
    """The part of a module at a path such as `down_blocks.0.resnets.1`."""
    for key in path.split("."):
        module = module[int(key)] if key.isdigit() else getattr(module, key)
    return module


def host(value: Any) -> np.ndarray:
    """An array of either library, on the host."""
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def nhwc(value: Any) -> np.ndarray:
    """From torch's layout of images to ours."""
    return np.moveaxis(host(value), 1, -1)


def relative_error(got: Any, wanted: Any) -> float:
    """The largest difference, as a part of the largest value."""
    got, wanted = host(got).astype(np.float64), host(wanted).astype(np.float64)
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def psnr(got: Any, wanted: Any) -> float:
    """Peak signal-to-noise ratio of images in 0 to 1, in dB."""
    error = np.mean(np.square(host(got).astype(np.float64) - host(wanted)))
    return math.inf if error == 0 else -10 * math.log10(error)
