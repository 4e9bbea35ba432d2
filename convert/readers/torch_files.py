"""Torch's files (.ckpt, .bin, .pt, .pth), zip archives and what torch wrote before 1.6, read without torch.

torch.load(weights_only=True) would read them too. It takes memory on a file's word, though (`bytearray` is among what it
calls), holds the whole of an older file in memory, and refuses checkpoints that a trainer's callbacks left their class names
in. Here the pickle is read as data (`pickles`): no file can have anything called, and tensors stay in the file until read.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from distrijax.convert.readers import zips
from distrijax.convert.readers.pickles import UNKNOWN, Call, Hostile, Named, Persistent, read_pickle
from distrijax.convert.source import NAME, Source, checked_shape, reason
from distrijax.convert.tensors import Shape, Tensor, Tensors
from distrijax.errors import DistriError

MAGIC = 0x1950A86A20F9469CFC6C
LEGACY = b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little")
"""How a file begins that torch wrote before 1.6, or without its zip format: with a pickle of a number."""

STORAGES = {
    f"{name}Storage": np.dtype(kind)
    for name, kind in {
        "Double": "<f8",
        "Float": "<f4",
        "Half": "<f2",
        "BFloat16": ml_dtypes.bfloat16,
        "ComplexFloat": "<c8",
        "ComplexDouble": "<c16",
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
        "Untyped": "u1",
    }.items()
}

TYPES = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "uint64": np.dtype("<u8"),
}
"""Of tensors for which torch has no storage of their own."""

DEPTH = 16
"""Of dictionaries in dictionaries; checkpoints have two or three."""


Read = Callable[[int, Shape, np.dtype], np.ndarray]


class Storage(NamedTuple):
    """A run of elements that tensors are cut out of."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """A tensor as torch describes it: elements of a storage, from `start` on, `strides` apart."""

    storage: Storage
    start: int
    shape: Shape
    strides: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self):
        if len(self.strides) != len(self.shape) or any(
            type(s) is not int or s < 0 for s in (self.start, *self.strides)
        ):
            raise ValueError("a tensor's strides are not those of its shape")
        room = self.storage.count * self.storage.dtype.itemsize // self.dtype.itemsize - self.start
        if 0 not in self.shape and max(self.span, math.prod(self.shape)) > room:
            raise ValueError("a tensor has more elements than its storage")

    @property
    def span(self) -> int:
        """From its first element to its last, in elements."""
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))

    def tensor(self, source: Source, offset: int, read: Read) -> Tensor:
        """It, where its storage begins at `offset` of the file. read: what of the file is a given array."""
        if 0 in self.shape:
            return Tensor(self.shape, self.dtype, lambda: np.empty(self.shape, self.dtype))
        start, span = offset + self.start * self.dtype.itemsize, self.span
        if start + span * self.dtype.itemsize > source.size:
            raise ValueError(f"it ends at byte {source.size}, and a tensor goes on")
        if span == math.prod(self.shape) and self.strides == _row_major(self.shape, self.strides):
            return Tensor(self.shape, self.dtype, lambda: read(start, self.shape, self.dtype))
        return Tensor(self.shape, self.dtype, lambda: self._gathered(read(start, (span,), self.dtype)))

    def _gathered(self, elements: np.ndarray) -> np.ndarray:
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.ndarray(self.shape, self.dtype, elements, strides=steps).copy()


def _row_major(shape: Shape, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an array that lies in row-major order. Along an axis of length 1 any will do: those of `strides`."""
    result, step = [], 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        result.append(stride if length == 1 else step)
        step *= length
    return tuple(reversed(result))


def open_torch_zip(source: Source) -> Tensors:
    """The tensors of a zip archive such as torch writes. Raises DistriError for any other."""
    with _parsed(source):
        entries = zips.entries(source)
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or any("/code/" in name for name in entries):
            raise DistriError(
                f"{source.path} is a zip archive, but not one of weights that torch.save wrote; give one of a state_dict"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if (order := f"{folder}byteorder") in entries and source.read(
            zips.stored(entries, order).offset, 6
        ) != b"little":
            raise ValueError("its bytes are in the order of another machine")
        where = zips.stored(entries, pickles[0])
        zips.check(source, where)
        with source.open(where.offset) as file:
            content = read_pickle(file, where.size, source.spend, _convert)
        return {name: _in_zip(view, source, entries, folder) for name, view in _flattened(source, content).items()}


def _in_zip(view: View, source: Source, entries: dict[str, zips.Entry], folder: str) -> Tensor:
    entry = zips.stored(entries, f"{folder}data/{view.storage.key}")
    if entry.size < view.storage.count * view.storage.dtype.itemsize:
        raise ValueError(f"its storage {view.storage.key} is cut off")
    return view.tensor(source, entry.offset, partial(_checked, source, entry))


def _checked(source: Source, entry: zips.Entry, offset: int, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """A part of a storage; of all of it the CRC-32 can be told."""
    array = source.array(offset, shape, dtype)
    if array.nbytes == entry.size:
        with _parsed(source):
            entry.check(zlib.crc32(array.reshape(-1).view(np.uint8)))
    return array


def open_torch_legacy(source: Source) -> Tensors:
    """The tensors of a file of torch before 1.6: pickles, then the storages, each behind the number of its elements."""
    with _parsed(source), source.open() as file:
        _, version, system = (read_pickle(file, source.size - file.tell(), source.spend) for _ in range(3))
        if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("it is of another version, or its bytes are in the order of another machine")
        storages: dict[str, Storage] = {}
        content = read_pickle(file, source.size - file.tell(), source.spend, lambda call: _convert(call, storages))
        keys = read_pickle(file, source.size - file.tell(), source.spend)
        offsets = _legacy_offsets(source, file.tell(), keys, storages)
        views = _flattened(source, content).items()
        return {name: view.tensor(source, offsets[view.storage.key], source.array) for name, view in views}


def _legacy_offsets(source: Source, position: int, keys: Any, storages: dict[str, Storage]) -> dict[str, int]:
    """Where each storage begins; the first lies at `position`."""
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those it names")
    offsets = {}
    for key in keys:
        count = int.from_bytes(source.read(position, 8), "little")
        if count != storages[key].count:
            raise ValueError(f"its storage {key} has {count} elements and not {storages[key].count}")
        offsets[key] = position + 8
        position += 8 + count * storages[key].dtype.itemsize
    if position > source.size:
        raise ValueError(f"it ends at byte {source.size}, and {position} were promised")
    return offsets


def _convert(call: Call, storages: dict[str, Storage] | None = None) -> Any:
    """What a call in a pickle of torch's means: a tensor, or nothing that is needed."""
    function, arguments = call
    if function.module != "torch._utils":
        return UNKNOWN
    if function.name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and arguments:
        return arguments[0]
    if function.name not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3") or len(arguments) < 4:
        raise ValueError(f"it holds a tensor made by {function}, which can't be converted")
    storage = _storage(arguments[0])
    dtype = storage.dtype
    if function.name == "_rebuild_tensor_v3":
        named = arguments[6] if len(arguments) > 6 else None
        if not isinstance(named, Named) or named.name not in TYPES:
            raise ValueError("it holds tensors of a type that can't be converted")
        dtype = TYPES[named.name]
    if storages is not None and storages.setdefault(storage.key, storage) != storage:
        raise ValueError(f"its storage {storage.key} is described in two ways")
    if not isinstance(arguments[3], tuple):
        raise ValueError("a tensor's strides are not those of its shape")
    return View(storage, arguments[1], checked_shape(arguments[2]), arguments[3], dtype)


def _storage(description: Any) -> Storage:
    """The storage that a pickle names: ("storage", its type, key, device, elements)."""
    fields = description.description if isinstance(description, Persistent) else None
    if not isinstance(fields, tuple) or len(fields) not in (5, 6) or any(fields[5:]):
        raise ValueError("a tensor has no storage, or a part of one as torch before 0.4 wrote it")
    _, kind, key, _, count = fields[:5]
    if not isinstance(kind, Named) or kind.name not in STORAGES:
        raise ValueError("it holds tensors of a type that can't be converted")
    if not isinstance(key, str) or len(key) > NAME or type(count) is not int or not 0 <= count < 2**48:
        raise ValueError("a storage is not described as torch does it")
    return Storage(key, STORAGES[kind.name], count)


def _flattened(source: Source, content: Any) -> dict[str, View]:
    """The tensors of dictionaries in dictionaries, names joined by dots; the inside of a `state_dict`, if there is one.

    What is no tensor (an epoch, a learning rate, a trainer's settings) goes unsaid.
    """
    for _ in range(DEPTH):
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
    if isinstance(content, View):
        return {"tensor": content}
    if not isinstance(content, dict):
        raise ValueError("it holds no named tensors")
    found: dict[str, View] = {}
    _collect(source, content, "", found, set(), DEPTH)
    return found


def _collect(source: Source, content: dict, prefix: str, found: dict[str, View], seen: set[int], depth: int) -> None:
    """Raises ValueError for dictionaries that hold themselves, or that lie in more than one place."""
    if id(content) in seen or depth == 0:
        raise ValueError("a dictionary in it holds itself, or lies in several places")
    if len(prefix) > NAME:
        raise ValueError(f"names in it have more than {NAME} characters")
    seen.add(id(content))
    for key, value in content.items():
        if isinstance(value, dict):
            _collect(source, value, f"{prefix}{key}.", found, seen, depth - 1)
        elif isinstance(value, View):
            source.add(found, f"{prefix}{key}", value)


@contextmanager
def _parsed(source: Source) -> Iterator[None]:
    with source.parsed_as("torch file"):
        try:
            yield
        except Hostile as error:
            raise DistriError(
                f"{source.path} would have {reason(error)} called by whoever opens it as a pickle, and weights need no such thing; "
                "don't trust it, and look for a safetensors file instead"
            ) from None
