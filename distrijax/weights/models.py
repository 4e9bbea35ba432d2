"""Several models in one program, by name: layers and parameters of each are told apart by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec as P

from distrijax.parallel.programs import Params
from distrijax.weights.sharding import ModelLayout

NamedParams = dict[str, Params]
"""The parameters of each model of a program, by the model's name."""

UNET = "unet"
"""The name of the UNet that denoises."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of a program without their values; a static argument of jit.

    Layers ask the exchange under their paths, so models that share an exchange need paths of their own
    (`distrijax.models.layers.name_layers` with a prefix).

    Attributes:
        layouts: Names, and the layout of each model's parameters.
    """

    layouts: tuple[tuple[str, ModelLayout], ...]

    @classmethod
    def of(cls, **layouts: ModelLayout) -> Models:
        """Models by name.

        Args:
            **layouts: The layout of each model's parameters.
        """
        return cls(tuple(layouts.items()))

    @property
    def specs(self) -> dict[str, tuple[P, ...]]:
        """How the parameters are sharded."""
        return {name: layout.specs for name, layout in self.layouts}

    def abstract_params(self, sizes: Mapping[str, int], dtype: Any) -> dict[str, tuple]:
        """Shapes of the parameters.

        Args:
            sizes: Sizes of the mesh axes.
            dtype: Of the parameters.
        """
        return {name: layout.abstract_params(sizes, dtype) for name, layout in self.layouts}

    def modules(self, params: NamedParams) -> dict[str, nnx.Module]:
        """The modules that compute, inside a `shard_map` (`specs`).

        Args:
            params: What one device holds of the parameters.
        """
        return {name: layout.module(params[name]) for name, layout in self.layouts}
