"""distrijax: the lowest latency for one large Stable Diffusion image, on a mesh of accelerators, in JAX."""

from pathlib import Path

from distrijax.config import Compression, DistriConfig, Parallelism, SplitScheme, SyncMode
from distrijax.errors import DistriError, DistriWarning
from distrijax.parallel.mesh import MeshPlan, plan_mesh
from distrijax.pipelines.auto import load_pipeline
from distrijax.pipelines.call import PipelineOutput
from distrijax.pipelines.sd import DistriSDPipeline
from distrijax.pipelines.sdxl import DistriSDXLPipeline
from distrijax.schedulers import SCHEDULERS, load_scheduler, with_class

DEFAULT_MODEL = Path(__file__).parent / "tiny"
"""The embedded model: a small SDXL-shaped pipeline, trained by examples/train_tiny.py on scenes of coloured shapes."""

__all__ = [
    "DEFAULT_MODEL",
    "SCHEDULERS",
    "Compression",
    "DistriConfig",
    "DistriError",
    "DistriSDPipeline",
    "DistriSDXLPipeline",
    "DistriWarning",
    "MeshPlan",
    "Parallelism",
    "PipelineOutput",
    "SplitScheme",
    "SyncMode",
    "load_pipeline",
    "load_scheduler",
    "plan_mesh",
    "with_class",
]
