"""What readers take of the machine's memory, by the kernel's own count, for files that want much of it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import flax.serialization
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from facts import one_sentence
from tensor_files import torch_bytes
from test_hostile import legacy, zipped
from test_lies import entry, headed
from test_orbax_damaged import frame, rewritten

SPARE = 32 << 20
"""Bytes beside twice the file."""

CHILD = """
import os, sys
from pathlib import Path
import tensorstore
from distrijax import DistriError
from distrijax.convert.files import open_tensors
from distrijax.convert.readers.orbax_files import open_model

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

for path in map(Path, sys.argv[1:]):
    if os.fork() == 0:
        before = most()
        try:
            tensors = open_model(path) if path.is_dir() else open_tensors(path)
            told = f"{sum(tensor.read().shape is not None for tensor in tensors.values())} tensors"
        except DistriError as error:
            told = str(error)
        print(most() - before, path.name, told, sep="\\t", flush=True)
        os._exit(0)
    os.wait()
"""

NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_out_{}.alpha"


def tiny(count: int) -> bytes:
    """A safetensors file of very many tensors."""
    header = {NAME.format(n): entry((4,), 16 * n, 16 * n + 16) for n in range(count)}
    return headed(json.dumps(header).encode(), bytes(16 * count))


def told(*pairs: bytes) -> bytes:
    return headed(b'{"__metadata__":{%b},"a":%b}' % (b",".join(pairs), json.dumps(entry()).encode()))


HONEST = {
    "20000 safetensors": lambda: tiny(20_000),
    "8000 zip": lambda: torch_bytes({NAME.format(n): torch.zeros(4) for n in range(8000)}),
    "8000 legacy": lambda: torch_bytes({NAME.format(n): torch.zeros(4) for n in range(8000)}, legacy=True),
    "20000 flax": lambda: flax.serialization.msgpack_serialize({NAME.format(n): np.zeros(4) for n in range(20_000)}),
}
HOSTILE = {
    "safetensors pairs": lambda: told(*(b'"%d":""' % n for n in range(200_000))),
    "safetensors wide": lambda: told(b'"a":"%b\xf0\x9f\x98\x80"' % (b"a" * (15 << 20))),
    "safetensors numbers": lambda: headed({"a": {**entry(), "shape": [1000] * 2_000_000}}),
    "zip dictionaries": lambda: zipped(b"\x80\x02" + b"}" * 990_000 + b"."),
    "zip memo": lambda: zipped(b"\x80\x02N" + b"\x94" * 990_000 + b"."),
    "zip text": lambda: zipped(b"\x80\x02X" + struct.pack("<I", 15 << 20) + b"a" * (15 << 20) + b"."),
    "legacy texts": lambda: legacy(b"\x80\x02(" + b"X\2\0\0\0ab" * 990_000 + b"t."),
    "flax maps": lambda: msgpack.packb({"a": [{"a": None}] * 140_000}),
    "flax pieces": lambda: msgpack.packb({"a": [msgpack.ExtType(1, b"a")] * 290_000}),
}


def bombs(folder: Path) -> None:
    """Orbax folders: a chunk that zstd would blow up to a gigabyte, and a description that Python would, to half of one."""
    for name in ("orbax chunk", "orbax description"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder / name, {"a": np.ones(5)})
    rewritten(folder / "orbax chunk", "a/0", lambda _: frame(10_000))
    (folder / "orbax description" / "_METADATA").write_bytes(b"[" + b"[]," * (5 << 20) + b"[]]")


@pytest.fixture(scope="module")
def taken(tmp_path_factory) -> dict[str, tuple[int, int, str]]:
    """Of each file its bytes, the memory that its reading took, and what was said."""
    folder = tmp_path_factory.mktemp("memory")
    for name, make in (HONEST | HOSTILE).items():
        (folder / name).write_bytes(make())
    bombs(folder)
    paths = sorted(folder.iterdir())
    result = subprocess.run([sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True, check=True)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    return {name: (size(folder / name), int(count), told) for count, name, told in lines}


def size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size


@pytest.mark.parametrize("name", [*HONEST, *HOSTILE, "orbax chunk", "orbax description"])
def test_no_file_takes_more_than_twice_its_size(taken, name):
    bytes_, memory, told = taken[name]
    assert memory < 2 * bytes_ + SPARE, told
    if name in HONEST:
        assert told == f"{name.split()[0]} tensors"
    else:
        one_sentence(told, longest=600)
