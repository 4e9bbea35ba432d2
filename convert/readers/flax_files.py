"""Flax's msgpack files: arrays in maps in maps, found where they lie, and written as a stream.

flax.serialization packs an array as an extension of type 1, in which there are, packed again, its shape, the name of its type
and its bytes; an array above a gigabyte is a map of pieces. Its reader and its writer hold a whole model in memory; these don't.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from distrijax.convert.readers.safetensors_files import DTYPES, little_endian_bytes
from distrijax.convert.source import NAME, Source, checked_shape
from distrijax.convert.tensors import Tensor, Tensors
from distrijax.errors import DistriError

ARRAY, SCALAR = 1, 3
"""Flax's extension types; 2 is a complex number."""

CHUNKED = "__msgpack_chunked_array__"
CHUNK = 2**30
"""Bytes above which an array is written in pieces, as Flax does it: a msgpack object ends at 2^32."""

DEPTH = 32
VALUES = 300_000
TEXT = 1 << 16
"""Bounds of what a file may make its reader hold: maps in maps, values in all, bytes of a name."""

VALUE, KEY = 72, 72
"""Bytes of memory that a value takes, and that its place in a map takes besides."""

TYPES = {dtype.name: dtype for dtype in DTYPES.values()}
FLAX_TYPES = frozenset(TYPES) - {"float8_e8m0fnu"}


class Blob(NamedTuple):
    """Bytes of the file: an extension of type `code`, or raw bytes (code None)."""

    code: int | None
    offset: int
    size: int


def is_flax(head: bytes) -> bool:
    """Whether a file begins with a map that isn't empty. (A pickle's 0x80 would be an empty one.)"""
    return head[:1] != b"" and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))


def open_flax(source: Source) -> Tensors:
    """The tensors of a file, names joined by dots. Raises DistriError for one that is not whole or not Flax's."""
    with source.parsed_as("Flax file"), source.open() as file:
        parser = _Parser(file, source.spend, source.size)
        tree = parser.value(DEPTH)
        if parser.position != source.size:
            raise ValueError(f"{source.size - parser.position} bytes follow its end")
        found: Tensors = {}
        _collect(source, tree, "", found)
        return found


class _Parser:
    """Msgpack, with bytes and extensions left where they are. Raises ValueError for what is cut off or too much."""

    def __init__(self, file: BinaryIO, spend: Callable[[int], None], size: int, position: int = 0):
        self.file, self.spend, self.size, self.position = file, spend, size, position
        self.left = VALUES

    def value(self, depth: int) -> Any:
        self.spend(VALUE)
        self.left -= 1
        if depth == 0 or self.left < 0:
            raise ValueError("it has too many values, or maps in maps")
        kind = self.number("B")
        if kind <= 0x7F or kind >= 0xE0:
            return kind if kind <= 0x7F else kind - 256
        if kind <= 0x8F:
            return self.map(kind & 15, depth)
        if kind <= 0x9F:
            return self.list(kind & 15, depth)
        if kind <= 0xBF:
            return self.text(kind & 31)
        if kind not in _KINDS:
            raise ValueError(f"a value begins with byte {kind}, with which none does")
        return _KINDS[kind](self, depth)

    def take(self, count: int) -> bytes:
        if count > TEXT:
            raise ValueError(f"a name has {count} bytes")
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError(f"it ends at byte {self.size}, within a value")
        self.position += count
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(f">{form}", self.take(struct.calcsize(form)))[0]

    def text(self, count: int) -> str:
        text = self.take(count).decode("utf-8")
        self.spend(sys.getsizeof(text))
        return text

    def map(self, count: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth - 1)
            if not isinstance(key, str) or key in found:
                raise ValueError("a key is no text, or is there twice")
            self.spend(KEY)
            found[key] = self.value(depth - 1)
        return found

    def list(self, count: int, depth: int) -> list[Any]:
        return [self.value(depth - 1) for _ in range(count)]

    def blob(self, code: int | None, count: int) -> Blob:
        if count > self.size - self.position:
            raise ValueError(f"it ends at byte {self.size}, and {self.position + count} were promised")
        self.spend(VALUE)
        found = Blob(code, self.position, count)
        self.position += count
        self.file.seek(self.position)
        return found

    def extension(self, count: int) -> Blob:
        return self.blob(self.number("b"), count)


_KINDS: dict[int, Callable[[_Parser, int], Any]] = {
    0xC0: lambda parser, _: None,
    0xC2: lambda parser, _: False,
    0xC3: lambda parser, _: True,
    **{0xC4 + i: lambda parser, _, form=form: parser.blob(None, parser.number(form)) for i, form in enumerate("BHI")},
    **{0xC7 + i: lambda parser, _, form=form: parser.extension(parser.number(form)) for i, form in enumerate("BHI")},
    **{0xCA + i: lambda parser, _, form=form: parser.number(form) for i, form in enumerate("fdBHIQbhiq")},
    **{0xD4 + i: lambda parser, _, count=2**i: parser.extension(count) for i in range(5)},
    **{0xD9 + i: lambda parser, _, form=form: parser.text(parser.number(form)) for i, form in enumerate("BHI")},
    **{0xDC + i: lambda parser, depth, form=form: parser.list(parser.number(form), depth) for i, form in enumerate("HI")},
    **{0xDE + i: lambda parser, depth, form=form: parser.map(parser.number(form), depth) for i, form in enumerate("HI")},
}  # fmt: skip


def _collect(source: Source, value: Any, name: str, found: Tensors) -> None:
    if len(name) > NAME:
        raise ValueError(f"names in it have more than {NAME} characters")
    if isinstance(value, dict) and CHUNKED not in value:
        for key, inner in value.items():
            _collect(source, inner, f"{name}.{key}" if name else key, found)
        return
    if not isinstance(value, dict) and not (isinstance(value, Blob) and value.code in (ARRAY, SCALAR)):
        return  # a step, a name: no tensor
    source.add(found, name, _chunked(source, value) if isinstance(value, dict) else _array(source, value)[0])


def _array(source: Source, blob: Blob) -> tuple[Tensor, int]:
    """An array, and the offset of its bytes."""
    room = source.room
    with source.open(blob.offset) as file:
        parser = _Parser(file, source.spend, blob.offset + blob.size, blob.offset)
        fields = parser.value(DEPTH)
    source.room = room  # of what was parsed nothing is kept
    if not isinstance(fields, list) or len(fields) != 3 or not isinstance(fields[2], Blob):
        raise ValueError("an array is not described as Flax does it")
    shape, name, data = checked_shape(fields[0]), fields[1], fields[2]
    if not isinstance(name, str) or name not in TYPES:
        raise ValueError("an array's type is none that can be converted")
    if data.code is not None or math.prod(shape) * TYPES[name].itemsize != data.size:
        raise ValueError(f"an array of {data.size} bytes should be {name} {list(shape)}")
    return source.tensor(data.offset, shape, TYPES[name]), data.offset


def _chunked(source: Source, value: dict[str, Any]) -> Tensor:
    """An array in pieces."""
    shape = checked_shape(_in_order(value.get("shape")))
    pieces = [_array(source, piece) for piece in _in_order(value.get("chunks")) if isinstance(piece, Blob)]
    dtypes = {piece.dtype for piece, _ in pieces}
    if len(dtypes) != 1 or sum(piece.size for piece, _ in pieces) != math.prod(shape):
        raise ValueError("the pieces of an array don't make it up")
    (dtype,) = dtypes

    def read() -> np.ndarray:
        whole = np.empty(shape, dtype)
        flat, start = whole.reshape(-1), 0
        for piece, offset in pieces:
            source.fill(flat[start : start + piece.size], offset)
            start += piece.size
        return whole

    return Tensor(shape, dtype, read)


def _in_order(value: Any) -> list[Any]:
    """What Flax makes of a tuple: {"0": ..., "1": ...}."""
    if not isinstance(value, dict) or value.keys() != {str(i) for i in range(len(value))}:
        raise ValueError("the pieces of an array are not numbered")
    return [value[str(i)] for i in range(len(value))]


def write_flax(tensors: Tensors, path: Path) -> None:
    """Writes a file as flax.serialization would, names cut at their dots into maps, one tensor in memory at a time.

    Raises DistriError for a type that Flax doesn't have, and for a name that another begins with.
    """
    with path.open("wb") as file:
        _write_map(file, _tree(tensors))
        file.flush()
        os.fsync(file.fileno())


def _tree(tensors: Tensors) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name in sorted(tensors):
        *above, last = name.split(".")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise DistriError(f"{name} begins with the name of another tensor, which Flax can't hold; rename it")
        inner[last] = (name, tensors[name])
        if tensors[name].dtype.name not in FLAX_TYPES:
            raise DistriError(f"{name} is {tensors[name].dtype}, which Flax's files don't have; use another precision")
    return tree


def _write_map(file: BinaryIO, tree: dict[str, Any]) -> None:
    file.write(_map(len(tree)))
    for key, value in tree.items():
        file.write(_text(key))
        if isinstance(value, dict):
            _write_map(file, value)
        else:
            _write_tensor(file, *value)


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor) -> None:
    data = little_endian_bytes(name, tensor)
    if tensor.nbytes <= CHUNK:
        _write_array(file, tensor.shape, tensor.dtype, data)
        return
    each = CHUNK // tensor.dtype.itemsize * tensor.dtype.itemsize
    file.write(_map(3) + _text(CHUNKED) + b"\xc3" + _text("shape") + _map(len(tensor.shape)))
    for axis, length in enumerate(tensor.shape):
        file.write(_text(str(axis)) + _int(length))
    file.write(_text("chunks") + _map(-(-len(data) // each)))
    for number, start in enumerate(range(0, len(data), each)):
        piece = data[start : start + each]
        file.write(_text(str(number)))
        _write_array(file, (len(piece) // tensor.dtype.itemsize,), tensor.dtype, piece)


def _write_array(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, data: memoryview) -> None:
    """An array, packed in an extension, in the fewest bytes that msgpack has for it."""
    axes = bytes([0x90 | len(shape)]) if len(shape) < 16 else struct.pack(">BH", 0xDC, len(shape))
    inner = b"\x93" + axes + b"".join(map(_int, shape)) + _text(dtype.name)
    inner += _sized(len(data), 0xC4)
    size = len(inner) + len(data)
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(size)
    file.write((bytes([fixed]) if fixed else _sized(size, 0xC7)) + bytes([ARRAY]) + inner)
    file.write(data)


def _sized(size: int, first: int) -> bytes:
    """The head of raw bytes (first: 0xc4) or an extension (0xc7), whose size follows in 8, 16 or 32 bits."""
    step = 0 if size < 2**8 else 1 if size < 2**16 else 2
    return struct.pack(f">B{'BHI'[step]}", first + step, size)


def _map(count: int) -> bytes:
    if count < 16:
        return bytes([0x80 | count])
    return struct.pack(">BH", 0xDE, count) if count < 2**16 else struct.pack(">BI", 0xDF, count)


def _text(text: str) -> bytes:
    data = text.encode()
    return (bytes([0xA0 | len(data)]) if len(data) < 32 else _sized(len(data), 0xD9)) + data


def _int(number: int) -> bytes:
    if number < 2**7:
        return bytes([number])
    step = next(step for step in range(4) if number < 2 ** (8 << step))
    return struct.pack(f">B{'BHIQ'[step]}", 0xCC + step, number)
