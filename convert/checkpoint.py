"""A pipeline's parts, as in a folder of the diffusers layout, before any weights are read.

sources (folder, single file, hub)  --->  Checkpoint  --->  destinations (folder, single file, orbax)
                                             ^
                  LoRA, embeddings, another VAE or UNet: functions from a Checkpoint to a Checkpoint
"""

from __future__ import annotations

import dataclasses
from typing import Any

from distrijax.convert.tensors import Tensors


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parts of a pipeline, by their names in the diffusers layout (`unet`, `vae`, `text_encoder`, ...).

    index: model_index.json. configs: config.json (scheduler_config.json) of each part that has one.
    tensors: of each model, with PyTorch's names and layouts. files: of the tokenizers, by path: `tokenizer/vocab.json`.
    """

    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, Tensors]
    files: dict[str, bytes]

    def with_tensors(self, part: str, tensors: Tensors) -> Checkpoint:
        """With other weights of one part."""
        return dataclasses.replace(self, tensors={**self.tensors, part: tensors})
