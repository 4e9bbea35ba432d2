"""Tensor parallelism's weights: which part of a layer's channels each device holds (arXiv 1909.08053, section 3).

Layers say how they may be divided (`distrijax.layers.Cut`): attention by heads, the feed-forward network and what lies
between the two convolutions of a resnet by channels, convolutions that change the size by input channels. Here their
parameters are laid out for that: along the divided axis the channels are padded with zeros to a multiple of the devices,
which changes no sum, and put in the devices' order, so that an even cut gives each its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from distrijax.config import Parallelism
from distrijax.layers import Cut, Side, walk
from distrijax.mesh import PATCH
from distrijax.processes import put
from distrijax.weights import ParamPath, Place, Placement


class Piece(NamedTuple):
    """The divided axis of a parameter, in whose `cut` `length` channels go to so many devices."""

    axis: int
    cut: Cut
    length: int

    def spec(self) -> P:
        """How the laid out parameter lies on the mesh."""
        return P(*[None] * self.axis, PATCH)

    def shape(self, shape: tuple[int, ...], devices: int) -> tuple[int, ...]:
        """The shape of a parameter that is laid out."""
        return (*shape[: self.axis], devices * self._each(devices), *shape[self.axis + 1 :])

    def lay_out(self, value: Float[np.ndarray, "..."], devices: int) -> Float[np.ndarray, "..."]:
        """A parameter in the order of the devices, padded with zeros."""
        unit, parts = self.cut.unit, self.cut.parts
        last = np.moveaxis(value, self.axis, -1)
        units = last.reshape(*last.shape[:-1], parts, -1, unit)
        missing = devices * self._each(devices) // (parts * unit) - units.shape[-2]
        units = np.pad(units, [(0, 0)] * (units.ndim - 2) + [(0, missing), (0, 0)])
        shared = units.reshape(*units.shape[:-2], devices, -1, unit).swapaxes(-4, -3)
        return np.moveaxis(shared.reshape(*last.shape[:-1], -1), -1, self.axis)

    def _each(self, devices: int) -> int:
        group = self.cut.unit * self.cut.parts
        return math.ceil(self.length // group / devices) * group


def pieces(module: nnx.Module) -> dict[ParamPath, Piece]:
    """The parameters of a module that are divided, by their path; all others lie whole on every device."""
    found = {}
    for path, layer in walk(module):
        if (cut := getattr(layer, "cut", None)) is None:
            continue
        for name in ("kernel", "bias", "scale"):
            value = getattr(layer, name, None)
            if value is None or (cut.side is Side.INPUT and name != "kernel"):
                continue
            axis = len(value.shape) - (2 if cut.side is Side.INPUT else 1)
            found[(*path, name)] = Piece(axis, cut, value.shape[axis])
    return found


def specs(module: nnx.Module, parallelism: Parallelism) -> P | tuple[P, ...]:
    """How the leaves of a module lie on the mesh, in the order of `jax.tree.leaves`."""
    if parallelism is not Parallelism.TENSOR:
        return P()
    divided = pieces(module)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(module))]
    return tuple(divided[path].spec() if path in divided else P() for path in paths)


def shared_out(module: nnx.Module, parallelism: Parallelism, devices: int) -> tuple[nnx.Module, P | tuple[P, ...]]:
    """A module of shapes as so many devices together hold it, and how its leaves lie on the mesh."""
    if parallelism is not Parallelism.TENSOR:
        return module, P()
    divided = pieces(module)
    graph, state = nnx.split(module)
    for path, leaf in nnx.to_flat_state(state):
        if path in divided:
            leaf.set_value(jax.ShapeDtypeStruct(divided[path].shape(leaf.shape, devices), leaf.dtype))
    return nnx.merge(graph, state), specs(module, parallelism)


def place_on(mesh: Mesh, parallelism: Parallelism = Parallelism.PATCH) -> Placement:
    """Puts parameters on the devices of a mesh: whole on each, but for those that the parallelism divides."""

    def placement(module: nnx.Module) -> Place:
        divided = pieces(module) if parallelism is Parallelism.TENSOR else {}

        def place(path: ParamPath, value: np.ndarray) -> jax.Array:
            if path not in divided:
                return put(value, NamedSharding(mesh, P()))
            laid_out = divided[path].lay_out(value, mesh.shape[PATCH])
            return put(laid_out, NamedSharding(mesh, divided[path].spec()))

        return place

    return placement
