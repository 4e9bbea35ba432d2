"""Describes a file or folder: its kind, precision and sizes, and what is unusual about it."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path

from distrijax.convert.engine import Mapped
from distrijax.convert.files import metadata_of, open_tensors
from distrijax.convert.kinds import recognise
from distrijax.convert.layouts.families import FAMILIES
from distrijax.models.families import FAMILIES as PIPELINES
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.load import finite
from distrijax.weights.tensors import FLOATS, Tensor, Tensors

METADATA = (
    "modelspec.title", "modelspec.author", "modelspec.license", "ss_base_model_version", "ss_network_dim", "format"
)  # fmt: skip
"""Keys of a safetensors file's metadata that are printed."""


def describe_file(path: Path, what: str) -> Iterator[str]:
    """Lines about a single file of a model or an addition to one. Raises CheckpointError for one of another kind."""
    tensors = open_tensors(path)
    kind = recognise(tensors, what)
    yield f"{what}: {kind}{'' if kind in FAMILIES else ', no whole model'}, {_sizes(tensors)}"
    metadata = metadata_of(path)
    yield from (f"  {key}: {metadata[key]}" for key in METADATA if key in metadata)
    if any(name.startswith("model_ema.") for name in tensors):
        yield "  has averaged weights, which --ema takes"
    yield from _oddities(tensors, "")


def describe_checkpoint(checkpoint: Checkpoint, mapping: list[Mapped]) -> Iterator[str]:
    """Lines about a model and its parts."""
    name = checkpoint.index.get("_class_name")
    scheduler = checkpoint.configs.get("scheduler", {})
    yield f"pipeline: {name}{'' if name in PIPELINES else ', which can be converted but not run'}"
    yield f"scheduler: {scheduler.get('_class_name')}, predicts {scheduler.get('prediction_type', 'epsilon')}"
    for part, tensors in checkpoint.tensors.items():
        yield f"{part}: {_sizes(tensors)}"
    if dropped := [mapped.source for mapped in mapping if not mapped.diffusers]:
        yield f"dropped: {len(dropped)} tensors that are not needed ({', '.join(dropped[:4])}{' ...' * (len(dropped) > 4)})"
    for part, tensors in checkpoint.tensors.items():
        yield from _oddities(tensors, f"{part}.")


def _sizes(tensors: Tensors) -> str:
    count = sum(tensor.size for tensor in tensors.values())
    kinds = collections.Counter()
    for tensor in tensors.values():
        kinds[tensor.dtype.name] += tensor.size
    precisions = ", ".join(
        f"{name} ({share / count:.0%})" if len(kinds) > 1 else name for name, share in kinds.most_common()
    )
    return f"{len(tensors)} tensors, {count:,} parameters, {precisions}, {sum(t.nbytes for t in tensors.values()) / 1e9:.3g} GB"


def _oddities(tensors: Tensors, prefix: str) -> Iterator[str]:
    """Reads every tensor, one at a time."""
    found = collections.defaultdict(list)
    for name, tensor in tensors.items():
        if problem := _problem(tensor):
            found[problem].append(prefix + name)
    for problem, names in found.items():
        yield f"odd: {len(names)} {problem} ({', '.join(names[:4])}{' ...' * (len(names) > 4)})"


def _problem(tensor: Tensor) -> str | None:
    if tensor.dtype not in FLOATS or not tensor.size:
        return None
    array = tensor.read()
    if not finite(array):
        return "not finite"
    if len(tensor.shape) > 1 and not array.any():
        return "all zeros"
    return None
