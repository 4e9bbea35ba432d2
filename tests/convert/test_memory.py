"""What reading a file takes of the machine's memory, by the kernel's own count: little more than its largest tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flax.serialization
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from tensor_files import torch_bytes

COUNT, ELEMENTS = 48, 1 << 20
"""Tensors of a file, 4 MB each."""

MANY = 8000
"""Tensors of a file of very small ones."""

SPARE = 32 << 20
"""Bytes beside the largest tensors: imports, buffers, the names."""

CHILD = """
import os, sys
from pathlib import Path
import tensorstore, msgpack, orbax.checkpoint
from distrijax.convert.files import open_tensors
from distrijax.convert.readers.orbax_files import open_orbax

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

path = Path(sys.argv[1])
before = most()
tensors = open_orbax(path) if path.is_dir() else open_tensors(path)
count = sum(tensor.read().shape is not None for tensor in tensors.values())
print(count, most() - before)
"""


def tensors(count: int, size: int) -> dict[str, np.ndarray]:
    return {f"blocks.{n}.weight": np.full(size, n, np.float32) for n in range(count)}


def of_torch(arrays: dict[str, np.ndarray], *, legacy: bool) -> bytes:
    return torch_bytes({name: torch.from_numpy(array) for name, array in arrays.items()}, legacy=legacy)


def write_orbax(arrays: dict[str, np.ndarray], path: Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, arrays)


WRITERS = {
    "safetensors": lambda arrays, path: path.write_bytes(safetensors.numpy.save(arrays)),
    "zip": lambda arrays, path: path.write_bytes(of_torch(arrays, legacy=False)),
    "legacy": lambda arrays, path: path.write_bytes(of_torch(arrays, legacy=True)),
    "flax": lambda arrays, path: path.write_bytes(flax.serialization.msgpack_serialize(arrays)),
    "orbax": write_orbax,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("count", "size"), [(COUNT, ELEMENTS), (MANY, 4)], ids=["large", "many"])
def test_reading_takes_little_more_memory_than_the_largest_tensor(tmp_path, kind, count, size):
    if (kind, count) == ("orbax", MANY):
        count = 500  # each takes orbax a while
    WRITERS[kind](tensors(count, size), tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    found, taken = map(int, result.stdout.split())
    assert found == count
    assert taken < 8 * 4 * size + SPARE
