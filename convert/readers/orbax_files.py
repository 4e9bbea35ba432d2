"""Orbax checkpoints: a pipeline's tensors where JAX programs look for them, with PyTorch's names and layouts.

    folder/pipeline.json     the index, the configs and the tokenizers' files; written last, so a folder with it is whole
    folder/unet/             one orbax checkpoint for each model: a tree of one level, from a tensor's name to its array
    folder/text_encoder/     ...

A model may also be what `StandardCheckpointer().save` or `PyTreeCheckpointer().save` made of dictionaries of arrays.
One that is written here is `orbax.checkpoint.PyTreeCheckpointer().restore(folder / "unet")` to others. Orbax is in `train`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np

from distrijax.convert.checkpoint import Checkpoint
from distrijax.convert.readers.json_cost import json_cost
from distrijax.convert.readers.orbax_guard import METADATA, SMALL, check_folder, check_unpacked
from distrijax.convert.readers.safetensors_files import DTYPES
from distrijax.convert.source import Source, checked_shape, reason
from distrijax.convert.tensors import Shape, Tensor, Tensors
from distrijax.errors import DistriError
from distrijax.weights.names import shown

DESCRIPTION = "pipeline.json"

BATCH = 128 << 20
"""Bytes of tensors that are read at a time while a model is written; orbax takes about twice as many more."""

TYPES = frozenset(DTYPES.values())

EMPTY = ("None", "Dict", "List")
KINDS = ("np.ndarray", "jax.Array", "scalar", *EMPTY)
"""What orbax calls what a tree holds: arrays, and nothing."""

DESCRIBED = 1 << 16
CHUNK = 64
"""Bytes of an array's description at most, and what a chunk costs at least."""


def is_orbax(folder: Path) -> bool:
    """Whether a folder is one that `write_orbax` wrote, and to the end."""
    return (folder / DESCRIPTION).is_file()


def write_orbax(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a pipeline to a folder that isn't there yet or is empty; tensors are read in batches of 128 MB.

    Raises DistriError where something is in the folder, for a tensor without elements, which orbax doesn't hold, and where
    orbax isn't installed.
    """
    ocp = _orbax()
    folder = Path(folder).absolute()
    _check_writable(checkpoint, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part, tensors in checkpoint.tensors.items():
        if tensors:
            with ocp.Checkpointer(_handler_of_tensors(ocp)) as checkpointer:
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

    Raises DistriError for a folder that is not one or not whole, and where tensorstore isn't installed, which comes with orbax.
    """
    _tensorstore()
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise DistriError(f"{folder} is not a folder; give one that an orbax checkpoint was written to")
    if not is_orbax(folder):
        raise DistriError(
            f"{folder} has no {DESCRIPTION}, so no pipeline was written to it, or not to the end; write it again"
        )
    with _parsing(folder / DESCRIPTION):
        description = _json(Source(folder / DESCRIPTION))
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


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise DistriError(
            "orbax-checkpoint is not installed, which orbax checkpoints are written with; "
            "install it: pip install 'distrijax[train]'"
        ) from None
    return ocp


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError:
        raise DistriError(
            "tensorstore is not installed, which orbax checkpoints are read with; install it: pip install 'distrijax[train]'"
        ) from None
    return tensorstore


def _check_writable(checkpoint: Checkpoint, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DistriError(f"{folder} is there and not an empty folder; choose another one or empty it")
    for part, tensors in checkpoint.tensors.items():
        if empty := [name for name, tensor in tensors.items() if tensor.size == 0]:
            raise DistriError(
                f"{part}.{shown(empty[0])} has no elements, which orbax can't hold; leave it out or write another format"
            )


def _handler_of_tensors(ocp: Any) -> Any:
    """Orbax's handler of trees, for trees of `Tensor`; in the files they are numpy's arrays."""

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
    """The tensors of one model that orbax wrote, dictionaries in dictionaries named by dots; each is read when it is asked for.

    A folder is untrusted: `orbax_guard` looks at it first, and tensorstore opens one array at a time. Raises DistriError.
    """
    _tensorstore()
    with _parsing(folder):
        limit = check_folder(folder)
        tensors: Tensors = {}
        source = Source(folder / METADATA)
        for name in _names(source):
            array = Array.of(folder, name)
            limit -= array.room
            if limit < 0:
                raise ValueError("its arrays would become much more than it has bytes")
            source.add(tensors, name, Tensor(array.shape, array.dtype, partial(_read, folder, name, array)))
        return tensors


def _names(source: Source) -> Iterator[str]:
    """The names of a model's arrays. Raises ValueError for a tree of something else."""
    description = _json(source)
    if description.get("use_ocdbt") is not True or description.get("use_zarr3"):
        raise ValueError(
            "its arrays lie in files of their own, or as zarr 3, where use_ocdbt=True and use_zarr3=False are wanted"
        )
    for entry in description["tree_metadata"].values():
        kind = entry["value_metadata"]["value_type"]
        if kind not in KINDS:
            raise ValueError(f"it holds {shown(str(kind))}, and only arrays can be converted")
        if kind not in EMPTY:
            yield ".".join(step["key"] for step in entry["key_metadata"])


def _json(source: Source) -> dict[str, Any]:
    """An object of JSON, for which no more memory is taken than a file's reader may take."""
    if source.size > SMALL:
        raise ValueError(f"it has {source.size} bytes")
    text = source.read(0, source.size)
    source.spend(json_cost(text, source.room))
    description = json.loads(text)
    if not isinstance(description, dict):
        raise ValueError("it is no object")
    return description


class Array(NamedTuple):
    """What is known of an array before it is read: its description by zarr."""

    shape: Shape
    dtype: np.dtype
    chunks: Shape

    @classmethod
    def of(cls, folder: Path, name: str) -> Array:
        text = _stored(folder, f"{name}/.zarray")
        if len(text) > DESCRIBED:
            raise ValueError(f"the description of an array has {len(text)} bytes")
        found = json.loads(text)
        expected = {"zarr_format": 2, "order": "C", "filters": None, "dimension_separator": ".", "fill_value": None}
        if {key: found[key] for key in expected} != expected or found["compressor"]["id"] != "zstd":
            raise ValueError("an array in it is laid out as orbax doesn't do it")
        shape, chunks = checked_shape(found["shape"]), checked_shape(found["chunks"])
        dtype = np.dtype(found["dtype"])
        if dtype not in TYPES:
            raise ValueError(f"it holds {dtype}, which can't be converted")
        if len(chunks) != len(shape) or 0 in chunks:
            raise ValueError("the chunks of an array are none")
        return cls(shape, dtype, chunks)

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def counts(self) -> Shape:
        """Chunks along each axis."""
        return tuple(-(-length // chunk) for length, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def room(self) -> int:
        """Bytes of all chunks, which reach beyond the array at its ends, and something for each."""
        return math.prod(self.counts) * (self.chunk_bytes + CHUNK)


def _read(folder: Path, name: str, array: Array) -> np.ndarray:
    """One array of a model's checkpoint. A chunk that is missing is an error, where zarr would see zeros."""
    with _parsing(folder):
        for index in np.ndindex(array.counts):
            chunk = _stored(folder, f"{name}/{'.'.join(map(str, index)) or 0}")
            check_unpacked(chunk, array.chunk_bytes)
        spec = {"driver": "zarr", "kvstore": _tree(folder) | {"path": f"{name}/"}, "fill_missing_data_reads": False}
        opened = _tensorstore().open(spec, open=True, read=True).result()
        if (opened.shape, opened.dtype.numpy_dtype) != (array.shape, array.dtype):
            raise ValueError("it changed while it was read")
        return np.asarray(opened.read().result())


def _stored(folder: Path, key: str) -> bytes:
    """A value of the tree. Raises ValueError where there is none."""
    found = _tensorstore().KvStore.open(_tree(folder)).result().read(key).result()
    if found.state != "value":
        raise ValueError(f"{key!a} is missing")
    return found.value


def _tree(folder: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turns what is raised for files that are not orbax's into one sentence."""
    try:
        yield
    except DistriError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
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
