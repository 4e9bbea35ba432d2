"""A pipeline's parts, as in a folder of the diffusers layout, before any weights are read.

sources (folder, single file, hub)  --->  Checkpoint  --->  devices; or a folder, a single file, orbax
                                             ^
                  LoRA, embeddings, another VAE or UNet: functions from a Checkpoint to a Checkpoint
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distrijax.errors import CheckpointError
from distrijax.weights.recipe import Recipe
from distrijax.weights.tensors import FLOATS, Tensor, Tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """The parts of a pipeline, by their names in the diffusers layout (`unet`, `vae`, `text_encoder`, ...).

    Attributes:
        index: The content of model_index.json.
        configs: The config.json (scheduler_config.json) of each part that has one.
        tensors: Of each model, with PyTorch's names and layouts; empty where only configurations were asked for.
        files: Of the tokenizers, by path: `tokenizer/vocab.json`.
        what: Where it comes from, for errors.
        origins: Where single parts come from that were put in the place of its own, by part.
        recipe: What it was made of; by default of a source alone.
        found: Where the files and folders that it was opened from are on this machine, by what they are: `model`, `vae`,
            `lora FILE`, ...
    """

    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, Tensors]
    files: dict[str, bytes]
    what: str = "the checkpoint"
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe("the checkpoint"))
    found: dict[str, Path] = dataclasses.field(default_factory=dict)

    def origin(self, part: str) -> str:
        """Where a part comes from, for errors."""
        return self.origins.get(part, f"{self.what}/{part}")

    def with_tensors(self, part: str, tensors: Tensors) -> Checkpoint:
        """With other weights of one part."""
        return dataclasses.replace(self, tensors={**self.tensors, part: tensors})

    def files_of(self, folder: str) -> dict[str, bytes]:
        """The files of a tokenizer's folder, by name."""
        return {
            name.removeprefix(f"{folder}/"): data for name, data in self.files.items() if name.startswith(f"{folder}/")
        }

    def cast(self, dtype: Any) -> Checkpoint:
        """In another precision.

        Args:
            dtype: Of the weights; tensors of whole numbers stay what they are.

        Raises:
            CheckpointError: When a tensor is read that overflows.
        """

        def cast(name: str, tensor: Tensor) -> Tensor:
            same = tensor.dtype == dtype or tensor.dtype not in FLOATS
            return tensor if same else tensor.then(partial(_cast, name, np.dtype(dtype)), dtype=dtype)

        tensors = {
            part: {name: cast(f"{part}.{name}", tensor) for name, tensor in held.items()}
            for part, held in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors)


def _cast(name: str, dtype: np.dtype, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not np.isfinite(result).all() and np.isfinite(array).all():
        raise CheckpointError(
            f"{name} has numbers that {dtype} does not hold; choose another dtype, or a smaller weight of a LoRA"
        )
    return result
