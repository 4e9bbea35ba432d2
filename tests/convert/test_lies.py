"""Headers that lie: of safetensors and Flax files, and the names and shapes of models that are none."""

from __future__ import annotations

import json
import re
import time
import tracemalloc

import msgpack
import numpy as np
import pytest
from facts import refuses
from original_layouts import original, unread
from tensor_files import SPARE, read_all, refusal, written

from distrijax.convert.files import open_tensors
from distrijax.convert.layouts.original import from_original
from distrijax.convert.readers.safetensors_files import read_metadata
from distrijax.convert.tensors import of_array
from distrijax.errors import DistriError


def headed(header: object, data: bytes = bytes(12)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape=(3,), begin: int = 0, end: int = 12, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "overlapping": headed({"a": entry(), "b": entry(begin=0)}),
    "overlong": headed({"a": entry(end=2**40)}),
    "gap": headed({"a": entry((2,), 4, 12)}),
    "rest": headed({"a": entry((2,), 0, 8)}),
    "backwards": headed({"a": entry((3,), 12, 0)}),
    "negative": headed({"a": entry((3,), -12, 0)}),
    "huge shape": headed({"a": entry((2**62, 2**62))}),
    "huge shape of nothing": headed({"a": entry((0, 2**62), 0, 0)}, b""),
    "another size": headed({"a": entry((4,))}),
    "unknown type": headed({"a": entry(dtype="F13")}),
    "type without an array's": headed({"a": entry((24,), dtype="F4")}),
    "no entry": headed({"a": 3}),
    "no type": headed({"a": {"shape": [3], "data_offsets": [0, 12]}}),
    "list": headed([1, 2]),
    "no JSON": headed(b"{nothing}"),
    "deep": headed(b'{"a":' * 50_000),
    "deep lists": headed(b'{"a":' + b"[" * 100_000),
    "name twice": headed(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
    "field twice": headed(b'{"a":{"dtype":"F32","dtype":"F32","shape":[3],"data_offsets":[0,12]}}'),
    "many texts": headed(b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(260_000)) + b"}}", b""),
    "many numbers": headed(b'{"a":{"dtype":"F32","shape":[1%b],"data_offsets":[0,4]}}' % (b",1" * 2_000_001), bytes(4)),
    "long name": headed({"a" * 1000: entry()}),
    "many dimensions": headed({"a": entry((3, *(1,) * 70))}),
    "header beyond the file": (2**40).to_bytes(8, "little") + b"{}",
    "metadata of numbers": headed({"__metadata__": {"a": 1}, "a": entry()}),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_safetensors_headers_that_lie(tmp_path, content):
    path = written(tmp_path, content)
    refusal(path)
    with pytest.raises(DistriError):
        read_metadata(path) and read_all(path)


def test_a_header_longer_than_any_is_not_read(tmp_path):
    path = tmp_path / "file.weights"
    with path.open("wb") as file:
        file.write((17 << 20).to_bytes(8, "little") + b"{")
        file.truncate(20 << 20)
    tracemalloc.start()
    with refuses(str(path), 17 << 20):
        open_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def array(shape: list, kind: str = "float32", data: bytes = bytes(12)) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, kind, data), use_bin_type=True))


def chunked(shape: dict, chunks: dict) -> dict:
    return {"a": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}}


TREES = {
    "huge shape": {"a": array([2**47])},
    "huge product": {"a": array([2**40, 2**40])},
    "negative shape": {"a": array([-3])},
    "shape of texts": {"a": array(["3"])},
    "another size": {"a": array([4])},
    "unknown type": {"a": array([3], "float13")},
    "objects": {"a": array([3], "object")},
    "no shape": {"a": msgpack.ExtType(1, msgpack.packb(None))},
    "nothing": {"a": msgpack.ExtType(1, b"")},
    "text as data": {"a": msgpack.ExtType(1, msgpack.packb(([3], "float32", "a" * 12)))},
    "array in an array": {"a": msgpack.ExtType(1, msgpack.packb(([3], "float32", array([3]))))},
    "pieces of another size": chunked({"0": 2**40}, {"0": array([3])}),
    "pieces of two types": chunked({"0": 6}, {"0": array([3]), "1": array([3], "int32")}),
    "pieces not numbered": chunked({"0": 3}, {"1": array([3])}),
    "no pieces": chunked({"0": 0}, {}),
    "no pieces' shape": {"a": {"__msgpack_chunked_array__": True}},
    "keys of numbers": {3: array([3])},
}


@pytest.mark.parametrize("content", TREES.values(), ids=TREES)
def test_flax_files_that_lie(tmp_path, content):
    refusal(written(tmp_path, msgpack.packb(content, use_bin_type=True)))


PACKED = {
    "deep maps": b"\x81\xa1a" * 10_000 + b"\xc0",
    "deep lists": b"\x81\xa1a" + b"\x91" * 100_000,
    "many maps": b"\xdf\xff\xff\xff\xff",
    "many values": b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\0" * 400_000,
    "long text": b"\x81\xdb\xff\xff\xff\xffa",
    "long bytes": b"\x81\xa1a\xc6\xff\xff\xff\xffa",
    "long extension": b"\x81\xa1a\xc9\xff\xff\xff\xff\1a",
    "key twice": b"\x82\xa1a\xc0\xa1a\xc0",
    "unused byte": b"\x81\xa1a\xc1",
    "not UTF-8": b"\x81\xa1\xff\xc0",
    "rest": msgpack.packb({"a": array([3])}) + b"\0",
}


@pytest.mark.parametrize("content", PACKED.values(), ids=PACKED)
def test_msgpack_that_lies(tmp_path, content):
    refusal(written(tmp_path, content), spare=10 * SPARE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1j])
def test_a_training_step_that_is_no_number(value):
    tensors = unread(original("sd2")) | {"global_step": of_array(np.array([value]))}
    assert from_original(tensors, "file").configs["scheduler"]["prediction_type"] == "v_prediction"


NUMBERED = {
    "VAE blocks": ("sd1", "first_stage_model.decoder.up.{}.block.0.norm1.weight"),
    "text layers": ("sd2", "cond_stage_model.model.transformer.resblocks.{}.ln_1.weight"),
    "UNet blocks": ("sdxl", "model.diffusion_model.input_blocks.{}.0.op.weight"),
}


@pytest.mark.parametrize("case", NUMBERED.values(), ids=NUMBERED)
def test_models_of_very_many_blocks_are_refused_soon(case):
    """Every name is tried with the names of every block: 10,000 of each would take minutes."""
    family, name = case
    tensors = unread(original(family) | {name.format(n): (8,) for n in range(10_000)})
    start = time.perf_counter()
    with refuses(re.compile("^file")):
        from_original(tensors, "file")
    assert time.perf_counter() - start < 5
