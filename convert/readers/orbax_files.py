"""Orbax checkpoints of one model: a tree of one level, from a tensor's name, with PyTorch's names and layouts, to its array.

A model may also be what `StandardCheckpointer().save` or `PyTreeCheckpointer().save` made of dictionaries of arrays. Other
programs read it with `orbax.checkpoint.PyTreeCheckpointer().restore`. Orbax and tensorstore are imported where they are used,
since that takes a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distrijax.convert.readers.safetensors_files import NAMES
from distrijax.errors import CheckpointError
from distrijax.weights.names import shown
from distrijax.weights.source import reason
from distrijax.weights.tensors import Block, Tensor, Tensors

BATCH = 128 << 20
"""Bytes of tensors that are read at a time while a model is written; orbax takes about twice as many in addition."""


def write_orbax(tensors: Tensors, folder: Path) -> None:
    """Writes a model to a folder that does not exist, in batches of 128 MB.

    Raises CheckpointError for a tensor without elements, which orbax cannot hold.
    """
    import orbax.checkpoint as ocp

    if empty := [name for name, tensor in tensors.items() if tensor.size == 0]:
        raise CheckpointError(
            f"{shown(empty[0])} has no elements, which orbax cannot hold; leave it out or write another format"
        )
    with ocp.Checkpointer(_handler_of_tensors()) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(tensors)))


def open_orbax(folder: Path) -> Tensors:
    """The tensors of one model that orbax wrote, names of nested dictionaries joined by dots; each is read when asked for.

    Orbax lists the arrays, and tensorstore reads them: restoring one array with orbax takes ten times as long.
    Raises CheckpointError for a folder without a model, or with more than arrays.
    """
    import orbax.checkpoint as ocp

    folder = folder.absolute()
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
