"""Orbax checkpoints: a pipeline's tensors where JAX programs look for them, with PyTorch's names and layouts.

    folder/pipeline.json     the index, the configs and the tokenizers' files; written last, so a folder with it is whole
    folder/unet/             one orbax checkpoint for each model: a tree of one level, from a tensor's name to its array
    folder/text_encoder/     ...

A model may also be what `StandardCheckpointer().save` or `PyTreeCheckpointer().save` made of dictionaries of arrays.
One that is written here is `orbax.checkpoint.PyTreeCheckpointer().restore(folder / "unet")` to others. Orbax and tensorstore are
imported when they are used, for that takes a while.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from distrijax.convert.checkpoint import Checkpoint
from distrijax.convert.readers.safetensors_files import DTYPES
from distrijax.convert.source import reason
from distrijax.convert.tensors import Tensor, Tensors
from distrijax.errors import DistriError
from distrijax.weights.names import shown

DESCRIPTION = "pipeline.json"

BATCH = 128 << 20
"""Bytes of tensors that are read at a time while a model is written; orbax takes about twice as many more."""

TYPES = frozenset(DTYPES.values())


def is_orbax(folder: Path) -> bool:
    """Whether a folder is one that `write_orbax` wrote, and to the end."""
    return (folder / DESCRIPTION).is_file()


def write_orbax(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a pipeline to a folder that isn't there yet or is empty; tensors are read in batches of 128 MB.

    Raises DistriError where something is in the folder, and for a tensor without elements, which orbax doesn't hold.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    _check_writable(checkpoint, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in checkpoint.tensors.items():
        if tensors:
            with ocp.Checkpointer(_handler_of_tensors()) as checkpointer:
                checkpointer.save(folder / part, args=ocp.args.PyTreeSave(dict(tensors)))
    description = {
        "index": checkpoint.index,
        "configs": checkpoint.configs,
        "models": {part: bool(tensors) for part, tensors in checkpoint.tensors.items()},
        "files": {path: _packed(data) for path, data in checkpoint.files.items()},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_orbax(folder: Path) -> Checkpoint:
    """The pipeline that `write_orbax` wrote; shapes and types are known, and each tensor is read when it is asked for.

    Raises DistriError for a folder that is not one or not whole.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise DistriError(f"{folder} is not a folder; give one that an orbax checkpoint was written to")
    if not is_orbax(folder):
        raise DistriError(
            f"{folder} has no {DESCRIPTION}, so no pipeline was written to it, or not to the end; write it again"
        )
    with _parsing(folder / DESCRIPTION):
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        models, packed = _object(description, "models"), _object(description, "files")
        for path in (*models, *packed):
            _check_inside(path)
        if any("/" in part for part in models):
            raise ValueError("a model's name is a path")
        files = {path: _unpacked(value) for path, value in packed.items()}
        index, configs = _object(description, "index"), _object(description, "configs")
        if not all(isinstance(config, dict) for config in configs.values()):
            raise ValueError("a config is no object")
    tensors = {part: open_model(folder / part) if held else {} for part, held in models.items()}
    return Checkpoint(index, configs, tensors, files)


def _check_writable(checkpoint: Checkpoint, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DistriError(f"{folder} is there and not an empty folder; choose another one or empty it")
    for part, tensors in checkpoint.tensors.items():
        if empty := [name for name, tensor in tensors.items() if tensor.size == 0]:
            raise DistriError(
                f"{part}.{shown(empty[0])} has no elements, which orbax can't hold; leave it out or write another format"
            )


def _handler_of_tensors() -> Any:
    """Orbax's handler of trees, for trees of `Tensor`; in the files they are numpy's arrays."""
    import orbax.checkpoint as ocp

    class TensorHandler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values, infos, args=None) -> list:
            args = args or [ocp.SaveArgs()] * len(values)
            for batch in _batches(values):
                arrays = [values[i].read() for i in batch]
                written = await super().serialize(arrays, [infos[i] for i in batch], [args[i] for i in batch])
                for commit in written:
                    commit.result()  # only then may the next ones be read
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (Tensor, TensorHandler(deepcopy_host_arrays=False)),
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(),
        ),  # there are none; orbax logs a warning where they have no handler
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _batches(values: Iterable[Tensor]) -> Iterator[list[int]]:
    """Numbers of tensors that come in at a time."""
    batch: list[int] = []
    size = 0
    for number, value in enumerate(values):
        if batch and size + value.nbytes > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += value.nbytes
    if batch:
        yield batch


def open_model(folder: Path) -> Tensors:
    """The tensors of one model that orbax wrote, names of nested dictionaries joined by dots; each is read when asked for.

    Orbax tells what arrays there are, and tensorstore reads one at a time: restoring one by orbax takes ten times as long.
    Raises DistriError for a folder without a model, or with more than arrays.
    """
    import orbax.checkpoint as ocp

    with _parsing(folder):
        held = ocp.PyTreeCheckpointer().metadata(folder).item_metadata
        if held is None:
            raise ValueError("it holds no model")
        tensors: Tensors = {}
        for name, array in ocp.tree.to_flat_dict(held.tree, sep=".").items():
            if array is None:
                continue
            if (dtype := np.dtype(array.dtype)) not in TYPES:
                raise ValueError(f"it holds {dtype}, which cannot be converted")
            tensors[name] = Tensor(tuple(array.shape), dtype, partial(_read, folder, name))
        return tensors


def _read(folder: Path, name: str) -> np.ndarray:
    """One array of a model. A chunk that is missing is an error, where zarr would see zeros."""
    import tensorstore

    tree = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": tree, "fill_missing_data_reads": False}
    with _parsing(folder):
        return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turns what is raised for files that are not orbax's into one sentence."""
    try:
        yield
    except DistriError:
        raise
    except Exception as error:  # libraries raise classes of their own
        raise DistriError(
            f"{path} is not what was written as an orbax checkpoint ({reason(error)}); write it again"
        ) from None


def _object(description: dict[str, Any], key: str) -> dict[str, Any]:
    value = description.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key} is no object")
    return value


def _check_inside(path: str) -> None:
    """Raises ValueError for a path that leads out of a folder; whoever writes the files would follow it."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path or path in ("", "."):
        raise ValueError(f"{shown(path)} is no path in a folder")


def _packed(data: bytes) -> dict[str, str]:
    """Bytes in JSON: as text where they are one."""
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode("ascii")}


def _unpacked(value: Any) -> bytes:
    match value:
        case {"text": str(text)}:
            return text.encode("utf-8")
        case {"base64": str(text)}:
            return base64.b64decode(text, validate=True)
    raise ValueError("a file is neither text nor base64")
