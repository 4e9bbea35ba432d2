"""Folders in the diffusers layout: read from safetensors, pickles, old Flax weights or orbax, and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from distrijax.convert.files import open_tensors
from distrijax.convert.layouts.flax_names import from_flax
from distrijax.convert.readers.orbax_files import open_orbax, write_orbax
from distrijax.convert.readers.safetensors_files import write_safetensors
from distrijax.errors import CheckpointError
from distrijax.json_config import read_json
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.files import STEMS, check_variant, weight_files
from distrijax.weights.names import current_name, shown
from distrijax.weights.tensors import Tensors

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")

ORBAX = "orbax"
"""The folder within a model's folder that holds its weights as orbax has them."""

LARGEST = 64 << 20
"""Bytes of a tokenizer's file; CLIP's vocabulary is 1.6 MB."""


def from_folder(folder: Path, *, variant: str | None = None, weights: bool = True) -> Checkpoint:
    """The parts of a folder in the diffusers layout.

    variant: of the weights, such as fp16, in those parts that have it. weights: whether they are needed, or configurations
    alone. Safety checker, feature extractor and image encoder are left out.
    Raises CheckpointError for parts that are absent or cannot be read.
    """
    index = _without_flax(read_json(folder / "model_index.json"))
    there = [part for part, library in index.items() if isinstance(library, list) and library and library[0]]
    models = [part for part in MODELS if part in there]
    if "unet" not in models or "vae" not in models:
        raise CheckpointError(
            f"{folder} has no unet and vae in its model_index.json; a pipeline of Stable Diffusion is needed"
        )
    known = (*MODELS, *TOKENIZERS, "scheduler")
    if absent := [part for part in there if part in known and not (folder / part).is_dir()]:
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}; give a complete pipeline")
    if weights:
        check_variant(folder, models, variant)
    configs = {part: _without_flax(read_json(folder / part / "config.json")) for part in models}
    configs["scheduler"] = _without_flax(read_json(folder / "scheduler" / "scheduler_config.json"))
    return Checkpoint(
        index={**index, **{part: [None, None] for part in there if part not in known}},
        configs=configs,
        tensors={part: read_model(folder / part, variant=variant) for part in models} if weights else {},
        files={name: data for part in TOKENIZERS if part in there for name, data in _files(folder, part).items()},
        what=str(folder),
    )


def read_model(folder: Path, *, variant: str | None = None) -> Tensors:
    """The tensors of one model's folder, with PyTorch's layouts and today's names.

    Raises CheckpointError for a name that is there twice.
    """
    if (folder / ORBAX).is_dir():
        return open_orbax(folder / ORBAX)
    files = weight_files(folder, variant)
    found: Tensors = {}
    for file in files:
        for name, tensor in open_tensors(file).items():
            name = current_name(name)
            if name in found:
                raise CheckpointError(f"{folder} has the tensor {shown(name)} twice; fetch the folder again")
            found[name] = tensor
    return from_flax(found, str(folder)) if files[0].suffix == ".msgpack" else found


def _without_flax(value: Any) -> Any:
    """A config with Flax's class names replaced by PyTorch's, which lack the prefix."""
    if isinstance(value, dict):
        return {key: _without_flax(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_flax(inner) for inner in value]
    return value.removeprefix("Flax") if isinstance(value, str) else value


def read_files(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, bytes]]:
    """The configs and the tokenizers' files of a folder, whose weights need not be there."""
    configs = {part: folder / part / "config.json" for part in MODELS}
    configs["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    files = {name: data for part in TOKENIZERS for name, data in _files(folder, part).items()}
    return {part: read_json(path) for part, path in configs.items() if path.exists()}, files


def write_folder(
    checkpoint: Checkpoint, folder: Path, *, max_shard_size: int | str = "10GB", orbax: bool = False
) -> None:
    """Writes a folder in the diffusers layout: what `from_pretrained` reads, here and in diffusers.

    max_shard_size: bytes of a file of safetensors, or a text such as "5GB". orbax: write the weights as orbax has them, which
    diffusers does not read. Use `atomic_write` around it.
    """
    _write_json(folder / "model_index.json", checkpoint.index)
    for part, config in checkpoint.configs.items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        _write_json(folder / part / name, config)
    for name, data in checkpoint.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for part, tensors in checkpoint.tensors.items():
        if orbax:
            write_orbax(tensors, folder / part / ORBAX)
        else:
            stem = STEMS[".safetensors"][part.startswith("text_encoder")]
            _write_shards(tensors, folder / part, stem, max_shard_size)


def _write_shards(tensors: Tensors, folder: Path, stem: str, max_shard_size: int | str) -> None:
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda _: None,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, held in split.filename_to_tensors.items():
        write_safetensors({each: tensors[each] for each in held}, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path, part: str) -> dict[str, bytes]:
    """The files of a tokenizer's folder, by path."""
    found = {}
    for path in sorted((folder / part).glob("*")):
        if path.is_file():
            if path.stat().st_size > LARGEST:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, and no tokenizer's file has; remove it")
            found[f"{part}/{path.name}"] = path.read_bytes()
    return found
