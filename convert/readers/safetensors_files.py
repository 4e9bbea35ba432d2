"""Safetensors files: checked by the safetensors library, read where their header says, and written as a stream.

The library's tensors lie in a memory map, whose pages count as the process's memory while it is open, and its writer wants all
tensors at once. So tensors are read with pread here, and written a few at a time.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from distrijax.errors import CheckpointError
from distrijax.weights.source import Source
from distrijax.weights.tensors import Tensor, Tensors

RANKS = ("U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 BOOL").split()
"""Types in the order in which the library (0.8) lays tensors out: wide ones first, so that all are aligned."""

KINDS = "<u8 <i8 <f8 <c8 <f4 <u4 <i4 bfloat16 <f2 <u2 <i2 float8_e8m0fnu float8_e4m3fn float8_e5m2 i1 u1 ?".split()
DTYPES = {name: np.dtype(getattr(ml_dtypes, kind, kind)) for name, kind in zip(RANKS, KINDS, strict=True)}
"""NumPy's types by safetensors' names of them."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER = 16 << 20
"""Most bytes of a header. A whole SDXL has 0.3 MB, and LoRAs that list their training data a few."""

WRITERS = 2
"""Threads that each read, convert and write a tensor; one alone would keep a fast disk waiting while it copies."""

METADATA = "__metadata__"


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file that begins so may be one: the length of its header, and the header's brace."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def open_safetensors(source: Source) -> Tensors:
    """The tensors of a file, in the order of their names. Raises CheckpointError for one that is no safetensors file."""
    return _parsed(source)[0]


def read_metadata(source: Source) -> dict[str, str]:
    """The `__metadata__` of a safetensors file, such as a LoRA's training. Raises as `open_safetensors`."""
    return _parsed(source)[1]


def _parsed(source: Source) -> tuple[Tensors, dict[str, str]]:
    length = int.from_bytes(source.head(8), "little")
    if length > min(HEADER, source.size):
        raise source.broken("safetensors file", f"its header would be {length} bytes")
    with source.parsed_as("safetensors file"):
        with safe_open(source.path, framework="np"):
            pass
        header = json.loads(source.read(8, length))
        metadata = header.pop(METADATA, None) or {}
        return {name: _tensor(source, 8 + length, header[name]) for name in sorted(header)}, metadata


def _tensor(source: Source, start: int, entry: dict) -> Tensor:
    """The tensor of an entry of the header, which the library has checked."""
    if (dtype := DTYPES.get(entry["dtype"])) is None:
        raise CheckpointError(f"{source.path} holds tensors of {entry['dtype']}; use one of: {', '.join(DTYPES)}")
    return source.tensor(start + entry["data_offsets"][0], tuple(entry["shape"]), dtype)


def write_safetensors(tensors: Tensors, path: Path) -> None:
    """Writes a file, two tensors in memory at a time; the same tensors give the same bytes, and the library's `save_file` too.

    Raises CheckpointError for a type that safetensors does not have. Use `atomic_write` around it for a file that appears whole.
    """
    ordered = sorted(tensors.items(), key=lambda item: (RANKS.index(dtype_name(*item)), item[0]))
    if METADATA in tensors:
        raise CheckpointError(f"a tensor is named {METADATA}, which safetensors keeps for itself; rename it")
    header: dict[str, object] = {METADATA: {"format": "pt"}}  # which transformers requires
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": dtype_name(name, tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(WRITERS) as writers:

        def write(name: str, tensor: Tensor) -> None:
            start = header[name]["data_offsets"][0]
            _write_at(file.fileno(), little_endian_bytes(name, tensor), 8 + len(text) + start)

        _write_at(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text), 0)
        for _ in writers.map(write, *zip(*ordered, strict=True)):  # an error cancels the tensors after it
            pass
        os.fsync(file.fileno())


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def dtype_name(name: str, tensor: Tensor) -> str:
    """Safetensors' name of a tensor's type."""
    try:
        return NAMES[tensor.dtype.newbyteorder("<")]
    except KeyError:
        raise CheckpointError(
            f"{name} is {tensor.dtype}, which safetensors has no type for; use one of: {', '.join(DTYPES)}"
        ) from None


def little_endian_bytes(name: str, tensor: Tensor) -> memoryview:
    """A tensor's elements in row-major order. Raises CheckpointError where it is not what it was announced as."""
    array = tensor.read()
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise CheckpointError(
            f"{name} was read as {array.dtype} {list(array.shape)} and announced as {tensor.dtype} {list(tensor.shape)}; "
            "this is a mistake in a table of conversion: report it"
        )
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return memoryview(array.reshape(-1).view(np.uint8))
