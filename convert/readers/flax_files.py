"""Flax's msgpack files: maps in maps with arrays, found where they lie in the file.

flax.serialization packs an array as an extension of type 1 that holds, packed again, its shape, the name of its type and its
bytes; an array above a gigabyte is a map of pieces. Its own reader holds a whole model in memory. This one reads a file once to
find its arrays, with one array in memory at a time, and again when they are asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgpack
import numpy as np

from distrijax.convert.readers.safetensors_files import DTYPES
from distrijax.weights.source import Source, add, checked_shape
from distrijax.weights.tensors import Shape, Tensor, Tensors

ARRAY, SCALAR = 1, 3
"""Flax's extension types; 2 is a complex number."""

CHUNKED = "__msgpack_chunked_array__"

HEAD = 1024
"""Bytes of an array in which its shape and type lie."""

TYPES = {dtype.name: dtype for dtype in DTYPES.values()}


class Array(NamedTuple):
    """Where an array lies."""

    offset: int
    shape: Shape
    dtype: np.dtype


def is_flax(head: bytes) -> bool:
    """Whether a file begins with a map that isn't empty. (A pickle's 0x80 would be an empty one.)"""
    return head[:1] > b"\x80" and _is_map(head[0])


def _is_map(byte: int) -> bool:
    return 0x80 <= byte <= 0x8F or byte in (0xDE, 0xDF)


def open_flax(source: Source) -> Tensors:
    """The tensors of a file, names joined by dots. Raises CheckpointError for one that is not whole or not Flax's."""
    with source.parsed_as("Flax file"), source.open() as file:
        unpacker = msgpack.Unpacker(file, max_buffer_size=0)
        tree = _tree(unpacker, source)
        if unpacker.tell() != source.size:
            raise ValueError(f"{source.size - unpacker.tell()} bytes follow its end")
        found: Tensors = {}
        _collect(source, tree, "", found)
        return found


def _tree(unpacker: msgpack.Unpacker, source: Source) -> Any:
    """The next value of the file: dictionaries, in which arrays are `Array`s."""
    if _is_map(source.read(unpacker.tell(), 1)[0]):
        return {unpacker.unpack(): _tree(unpacker, source) for _ in range(unpacker.read_map_header())}
    value = unpacker.unpack()
    if not isinstance(value, msgpack.ExtType) or value.code not in (ARRAY, SCALAR):
        return value
    inner = msgpack.Unpacker()
    inner.feed(value.data[:HEAD])
    if inner.read_array_header() != 3:
        raise ValueError("an array is not described as Flax does it")
    shape, dtype = checked_shape(inner.unpack()), TYPES[inner.unpack()]
    size = math.prod(shape) * dtype.itemsize
    head = inner.tell() + (2 if size < 2**8 else 3 if size < 2**16 else 5)
    if head + size != len(value.data):
        raise ValueError(f"an array of {len(value.data) - head} bytes should be {dtype} {list(shape)}")
    return Array(unpacker.tell() - size, shape, dtype)


def _collect(source: Source, value: Any, name: str, found: Tensors) -> None:
    if isinstance(value, Array):
        add(found, name, source.tensor(*value))
    elif isinstance(value, dict) and CHUNKED in value:
        add(found, name, _chunked(source, value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            _collect(source, inner, f"{name}.{key}" if name else key, found)


def _chunked(source: Source, value: dict[str, Any]) -> Tensor:
    """An array in pieces; Flax turns a tuple into {"0": ..., "1": ...}."""
    shape = checked_shape([value["shape"][str(axis)] for axis in range(len(value["shape"]))])
    pieces = [source.tensor(*value["chunks"][str(number)]) for number in range(len(value["chunks"]))]
    dtype = pieces[0].dtype
    if {piece.dtype for piece in pieces} != {dtype} or sum(piece.size for piece in pieces) != math.prod(shape):
        raise ValueError("the pieces of an array do not add up to it")

    def read() -> np.ndarray:
        whole = np.empty(shape, dtype)
        flat, start = whole.reshape(-1), 0
        for piece in pieces:
            flat[start : start + piece.size] = piece.read().reshape(-1)
            start += piece.size
        return whole

    return Tensor(shape, dtype, read)
