"""Small files of tensors as other libraries write them, and what is asked of their readers."""

from __future__ import annotations

import io
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from facts import one_sentence

from distrijax.convert.files import open_tensors
from distrijax.errors import DistriError
from distrijax.weights.load import Values
from distrijax.weights.tensors import Tensors

Arrays = dict[str, np.ndarray]

NUMPY = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}
"""Types of torch that its `numpy()` doesn't know."""


def of_torch(tensor: torch.Tensor) -> np.ndarray:
    """The same elements, in row-major order."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype in NUMPY:
        return tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int16).numpy().view(NUMPY[tensor.dtype])
    return tensor.numpy()


def torch_bytes(content: object, *, legacy: bool = False, protocol: int = 2) -> bytes:
    """What torch.save writes of it."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return file.getvalue()


def arrays() -> Arrays:
    """One array of each type that NumPy and safetensors have, and shapes at the edges: none, empty, of odd length."""
    random = np.random.default_rng(0)
    kinds = ["f8", "f4", "f2", "c8", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", ml_dtypes.bfloat16]
    kinds += [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
    held = {f"kind.{np.dtype(kind).name}": random.integers(0, 100, (3, 5)).astype(kind) for kind in kinds}
    held["kind.bool"] = random.integers(0, 2, (7,)).astype(bool)
    held["scalar"] = np.array(1.5, np.float32)
    held["empty"] = np.zeros((0, 4), np.float16)
    held["of many axes"] = np.arange(2, dtype=np.int32).reshape(*[1] * 16, 2)
    return held | {
        "länge.日本": np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1),
        'a "\\\n\1\x7f': np.zeros(3, np.int8),
    }


def torch_state() -> dict[str, torch.Tensor]:
    """Tensors that lie in their storages in all the ways that state dicts have."""
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    floats = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    held = {f"kind.{dtype}": base.to(dtype) for dtype in (*floats, *whole)}
    held |= {"base": base, "tied": base, "transposed": base.permute(2, 0, 1), "cut": base[1:, ::2, 3]}
    held |= {"row": base[:, 2], "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "one": base[:1, :1, :1]}
    held["turned"] = base[0].T.to(torch.bfloat16)[1:]
    return held | {"parameter": torch.nn.Parameter(base[0]), "8 bit turned": base.to(torch.float8_e5m2)[0].T}


def small() -> dict[str, bytes]:
    """A small file of each format, by format."""
    held = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "a.bias": np.arange(3, dtype=np.float16)}
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    halves = {"0": np.arange(6, dtype=np.float32), "1": np.arange(6, 12, dtype=np.float32)}
    pieces = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4}, "chunks": halves}
    turned = {"a.turned": weight.T, "a.bytes": weight.to(torch.float8_e5m2).T}
    state = {"a.weight": weight, "a.bias": weight[0].half(), "a.parameter": torch.nn.Parameter(weight[1]), **turned}
    state = {"state_dict": state, "epoch": 3}
    return {
        "safetensors": safetensors.numpy.save(held, metadata={"format": "pt"}),
        "zip": torch_bytes(state),
        "legacy": torch_bytes(state, legacy=True),
        "flax": flax.serialization.msgpack_serialize(
            {"a": {"weight": pieces, "bias": held["a.bias"]}, "b": held["a.weight"]}
        ),
    }


def written(folder: Path, content: bytes) -> Path:
    """A file of it, whose name says nothing of its format."""
    path = folder / "file.weights"
    path.write_bytes(content)
    return path


SPARE = 3 << 20
"""Bytes that a reader may take beside twice the file: imports, buffers, the messages."""


def read_all(path: Path, find: Callable[[Path], Tensors] = open_tensors) -> int:
    """Reads the tensors that `find` finds one by one; how many."""
    tensors = find(path)
    for tensor in tensors.values():
        array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
    return len(tensors)


def refusal(path: Path, within: float = 5.0, spare: int = SPARE) -> str:
    """The sentence for a file that is not read. Fails where that takes long, or memory beyond twice the file."""
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(DistriError) as caught:
            read_all(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < within
    assert peak < 2 * path.stat().st_size + spare
    return sentence(caught.value, path)


def sentence(error: DistriError, path: Path) -> str:
    """What is said of a file or a folder. Fails where that is not one sentence which names it."""
    text = str(error)
    one_sentence(text, longest=600)
    assert str(path) in text
    return text


def everything(values: Values) -> np.ndarray:
    """All of a parameter or a tensor that may lie in a file."""
    return values[(slice(None),) * len(values.shape)]
