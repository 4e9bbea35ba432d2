"""Tensor parallelism's weights: which part of a layer's channels each device holds (arXiv 1909.08053, section 3).

Layers say how they may be divided (`distrijax.layers.Cut`): attention by heads, the feed-forward network and what lies
between the two convolutions of a resnet by channels, convolutions that change the size by input channels. Here their
parameters are laid out for that: along the divided axis the channels are padded with zeros to a multiple of the devices,
which changes no sum, and put in the devices' order, so that an even cut gives each its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from distrijax.layers import Cut, Side, walk
from distrijax.mesh import PATCH
from distrijax.weights import ParamPath, Values


class Piece(NamedTuple):
    """The divided axis of a parameter, in whose `cut` `length` channels go to the devices along some axes of the mesh."""

    axis: int
    cut: Cut
    length: int
    among: tuple[str, ...] = (PATCH,)

    def spec(self) -> P:
        """How the laid out parameter lies on the mesh."""
        return P(*[None] * self.axis, self.among)

    def shape(self, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of a parameter that is laid out. sizes: of the mesh's axes."""
        devices = self._devices(sizes)
        return (*shape[: self.axis], devices * self._each(devices), *shape[self.axis + 1 :])

    def block(self, value: Values, sizes: Mapping[str, int], at: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        """What the parameter in the order of the devices, padded with zeros, has at the place of one of them."""
        devices, parts = self._devices(sizes), self.cut.parts
        if self.length % (self.cut.unit * parts):
            raise ValueError(f"{self.length} channels are not {parts} parts of units of {self.cut.unit}")
        share, length = self._each(devices) // parts, self.length // parts
        first = (at[self.axis].start or 0) // parts

        def part(number: int) -> np.ndarray:
            start, stop = (number * length + min(end, length) for end in (first, first + share))
            held = value[*at[: self.axis], slice(start, stop), *at[self.axis + 1 :]]
            widths = [(0, 0)] * held.ndim
            widths[self.axis] = (0, share - (stop - start))
            return np.pad(held, widths)

        return np.concatenate([part(number) for number in range(parts)], self.axis)

    def restored(self, value: Array) -> Array:
        """A layer takes what its device holds."""
        return value

    def _devices(self, sizes: Mapping[str, int]) -> int:
        return math.prod(sizes[axis] for axis in self.among)

    def _each(self, devices: int) -> int:
        group = self.cut.unit * self.cut.parts
        return math.ceil(self.length // group / devices) * group


def pieces(module: nnx.Module) -> dict[ParamPath, Piece]:
    """The parameters of a module that may be divided, by their path."""
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
