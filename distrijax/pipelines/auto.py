"""Loads a checkpoint with the pipeline of its family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrijax.config import DistriConfig
from distrijax.parallel.programs import MAX_PROGRAMS
from distrijax.pipelines.build import Pipeline
from distrijax.pipelines.loading import find_family, find_folder
from distrijax.pipelines.sd import DistriSDPipeline
from distrijax.pipelines.sdxl import DistriSDXLPipeline


def load_pipeline(
    pretrained_model_name_or_path: str | Path,
    distri_config: DistriConfig | None = None,
    *,
    dtype: Any = None,
    variant: str | None = None,
    scheduler: str | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    compiler_options: Mapping[str, Any] | None = None,
    compile_for: Mapping[str, Any] | None = None,
    max_programs: int = MAX_PROGRAMS,
) -> Pipeline:
    """Loads a checkpoint with DistriSDPipeline or DistriSDXLPipeline, as its model_index.json says.

    Arguments, result and errors are those of `from_pretrained` of these classes.

    Raises:
        CheckpointError: Also for checkpoints of other families.
    """
    folder = find_folder(
        pretrained_model_name_or_path,
        variant=variant,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
    )
    family = find_family(folder)
    (kind,) = (kind for kind in (DistriSDPipeline, DistriSDXLPipeline) if kind.family is family)
    return kind.from_pretrained(
        folder,
        distri_config,
        dtype=dtype,
        variant=variant,
        scheduler=scheduler,
        scheduler_options=scheduler_options,
        compiler_options=compiler_options,
        compile_for=compile_for,
        max_programs=max_programs,
    )
