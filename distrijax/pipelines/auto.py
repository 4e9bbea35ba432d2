"""Loads a checkpoint with the pipeline of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrijax.config import DistriConfig
from distrijax.pipelines.build import Pipeline
from distrijax.pipelines.loading import check_arguments, find_family, opened
from distrijax.pipelines.sd import DistriSDPipeline
from distrijax.pipelines.sdxl import DistriSDXLPipeline
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.recipe import Additions

OPENING = ("variant", "revision", "token", "local_files_only", *Additions.__annotations__)
"""Arguments of `from_pretrained` that say what the checkpoint is."""


def load_pipeline(
    pretrained_model_name_or_path: str | Path | Checkpoint, distri_config: DistriConfig | None = None, **arguments: Any
) -> Pipeline:
    """Loads a checkpoint with DistriSDPipeline or DistriSDXLPipeline, as its model_index.json or its tensors say.

    Args:
        pretrained_model_name_or_path: As of `from_pretrained` of these classes.
        distri_config: As of `from_pretrained`.
        **arguments: As of `from_pretrained`.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: As `from_pretrained`, and for checkpoints of other families.
        InvalidArgument: As `from_pretrained`.
    """
    check_arguments(arguments, Pipeline.from_pretrained)
    said = {name: arguments.pop(name) for name in OPENING if name in arguments}
    checkpoint = opened(pretrained_model_name_or_path, **said)
    family = find_family(checkpoint)
    (kind,) = (kind for kind in (DistriSDPipeline, DistriSDXLPipeline) if kind.family is family)
    return kind.from_pretrained(checkpoint, distri_config, **arguments)
