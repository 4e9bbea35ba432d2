"""distrijax: one large Stable Diffusion image on many accelerators, at the lowest latency, in JAX.

Public names are imported at their first use, so that commands can act before JAX is imported, which takes seconds.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrijax.config import Compression, DistriConfig, Parallelism, SplitScheme, SyncMode
    from distrijax.convert.sources import open_checkpoint
    from distrijax.errors import CheckpointError, DistriError, DistriWarning, InvalidArgument, NotFinite, OutOfMemory
    from distrijax.parallel.mesh import MeshPlan, plan_mesh
    from distrijax.pipelines.auto import load_pipeline
    from distrijax.pipelines.call import PipelineOutput
    from distrijax.pipelines.sd import DistriSDPipeline
    from distrijax.pipelines.sdxl import DistriSDXLPipeline
    from distrijax.schedulers import SCHEDULERS, load_scheduler, with_class

__version__ = "0.1.0"

DEFAULT_MODEL = Path(__file__).parent / "tiny"
"""The embedded model: a small pipeline of SDXL's form, trained on scenes of coloured shapes by examples/train_tiny.py."""

_PLACES = {
    "SCHEDULERS": "schedulers",
    "CheckpointError": "errors",
    "Compression": "config",
    "DistriConfig": "config",
    "DistriError": "errors",
    "DistriSDPipeline": "pipelines.sd",
    "DistriSDXLPipeline": "pipelines.sdxl",
    "DistriWarning": "errors",
    "InvalidArgument": "errors",
    "MeshPlan": "parallel.mesh",
    "NotFinite": "errors",
    "OutOfMemory": "errors",
    "Parallelism": "config",
    "PipelineOutput": "pipelines.call",
    "SplitScheme": "config",
    "SyncMode": "config",
    "load_pipeline": "pipelines.auto",
    "load_scheduler": "schedulers",
    "open_checkpoint": "convert.sources",
    "plan_mesh": "parallel.mesh",
    "with_class": "schedulers",
}

__all__ = [
    "DEFAULT_MODEL",
    "SCHEDULERS",
    "CheckpointError",
    "Compression",
    "DistriConfig",
    "DistriError",
    "DistriSDPipeline",
    "DistriSDXLPipeline",
    "DistriWarning",
    "InvalidArgument",
    "MeshPlan",
    "NotFinite",
    "OutOfMemory",
    "Parallelism",
    "PipelineOutput",
    "SplitScheme",
    "SyncMode",
    "load_pipeline",
    "load_scheduler",
    "open_checkpoint",
    "plan_mesh",
    "with_class",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
