"""Orbax checkpoints: a pipeline's tensors where JAX programs look for them, with PyTorch's names and layouts.

    folder/pipeline.json     the index, the configs and the tokenizers' files; written last, so a folder with it is whole
    folder/unet/             one orbax checkpoint for each model: a tree of one level, from a tensor's name to its array
    folder/text_encoder/     ...

A model may also be what `StandardCheckpointer().save` or `PyTreeCheckpointer().save` made of dictionaries of arrays.
Other programs read one of these with `orbax.checkpoint.PyTreeCheckpointer().restore(folder / "unet")`. Orbax and tensorstore
are imported where they are used, since that takes a while.
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

from distrijax.convert.readers.safetensors_files import NAMES
from distrijax.convert.source import reason
from distrijax.errors import CheckpointError
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.names import shown
from distrijax.weights.tensors import Block, Tensor, Tensors

DESCRIPTION = "pipeline.json"

BATCH = 128 << 20
"""Bytes of tensors that are read at a time while a model is written; orbax takes about twice as many in addition."""


def is_orbax(folder: Path) -> bool:
    """Whether `write_orbax` wrote a folder, and finished."""
    return (folder / DESCRIPTION).is_file()


def write_orbax(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a pipeline to a folder that does not exist or is empty, in batches of 128 MB.

    Raises CheckpointError for a folder that is not empty, and for a tensor without elements, which orbax cannot hold.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder; choose another one or empty it")
    for part, tensors in checkpoint.tensors.items():
        if empty := [name for name, tensor in tensors.items() if tensor.size == 0]:
            raise CheckpointError(
                f"{part}.{shown(empty[0])} has no elements, which orbax cannot hold; leave it out or write another format"
            )
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
    """The pipeline that `write_orbax` wrote; each tensor is read when it is asked for.

    Raises CheckpointError for a folder that is not one or not whole.
    """
    folder = Path(folder).absolute()
    if not is_orbax(folder):
        raise CheckpointError(
            f"{folder} is not a folder with a {DESCRIPTION}, so no pipeline was written to it; write it again"
        )
    with _parsing(folder / DESCRIPTION):
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        files = {_inside(path): _unpacked(value) for path, value in description["files"].items()}
        models = {_inside(part): held for part, held in description["models"].items()}
        index, configs = dict(description["index"]), {part: dict(held) for part, held in description["configs"].items()}
    tensors = {part: open_model(folder / part) if held else {} for part, held in models.items()}
    return Checkpoint(index, configs, tensors, files)


def open_model(folder: Path) -> Tensors:
    """The tensors of one model that orbax wrote, names of nested dictionaries joined by dots; each is read when asked for.

    Orbax lists the arrays, and tensorstore reads them: restoring one array with orbax takes ten times as long.
    Raises CheckpointError for a folder without a model, or with more than arrays.
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
            if (dtype := np.dtype(array.dtype)) not in NAMES:
                raise ValueError(f"it holds {dtype}, which cannot be converted")
            read = partial(_read, folder, name)
            tensors[name] = Tensor(tuple(array.shape), dtype, read, read)
        return tensors


def _read(folder: Path, name: str, block: Block = ()) -> np.ndarray:
    """A block of an array of a model. A missing chunk is an error, where zarr would fill in zeros."""
    import tensorstore

    tree = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": tree, "fill_missing_data_reads": False}
    with _parsing(folder):
        return np.asarray(tensorstore.open(spec, open=True, read=True).result()[block].read().result())


def _handler_of_tensors() -> Any:
    """Orbax's handler of trees, for trees of `Tensor`, which it writes as NumPy's arrays."""
    import orbax.checkpoint as ocp

    class TensorHandler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values, infos, args=None) -> list:
            args = args or [ocp.SaveArgs()] * len(values)
            for batch in _batches(values):
                arrays = [values[i].read() for i in batch]
                for commit in await super().serialize(arrays, [infos[i] for i in batch], [args[i] for i in batch]):
                    commit.result()  # only then may the next ones be read
            return []

    handlers = ocp.type_handlers.create_type_handler_registry(
        (Tensor, TensorHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # there are none; without it orbax logs a warning
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)


def _batches(values: Iterable[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors that are read together."""
    batch, size = [], 0
    for number, value in enumerate(values):
        if batch and size + value.nbytes > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += value.nbytes
    if batch:
        yield batch


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turns what is raised for files that orbax did not write into one sentence."""
    try:
        yield
    except Exception as error:  # libraries raise classes of their own
        raise CheckpointError(
            f"{path} is not what was written as an orbax checkpoint ({reason(error)}); write it again"
        ) from None


def _inside(path: str) -> str:
    """A path, or the name of a model. Raises ValueError for one that leads out of its folder: files are written there."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path or path in ("", "."):
        raise ValueError(f"{shown(path)} is not a path in a folder")
    return path


def _packed(data: bytes) -> dict[str, str]:
    """Bytes in JSON: as text if they are valid UTF-8."""
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode("ascii")}


def _unpacked(value: dict[str, str]) -> bytes:
    return value["text"].encode("utf-8") if "text" in value else base64.b64decode(value["base64"], validate=True)
