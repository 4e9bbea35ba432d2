"""Files that other libraries wrote are read to the same tensors, and what is written here they read back."""

from __future__ import annotations

import os
import re
from pathlib import Path

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy
import torch
from facts import one_sentence, refuses, says
from tensor_files import Arrays, arrays, of_torch, small, torch_bytes, torch_state, written

from distrijax.convert.files import metadata_of, open_tensors
from distrijax.convert.readers.safetensors_files import write_safetensors
from distrijax.convert.readers.torch_files import LEGACY
from distrijax.errors import DistriError
from distrijax.weights.tensors import Tensor, of_array

NAMED = torch_state()


def check_same(path: Path, expected: Arrays) -> None:
    """Names, types, shapes and bytes, those of the types without an order of numbers (8 bit) among them."""
    tensors = open_tensors(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        array = tensor.read()
        assert (
            (tensor.shape, tensor.dtype) == (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype)
        )
        assert array.tobytes() == expected[name].tobytes(), name


def refusal(path: Path) -> str:
    with pytest.raises(DistriError) as caught:
        open_tensors(path)
    return str(caught.value)


def test_safetensors_of_the_library(tmp_path):
    check_same(written(tmp_path, safetensors.numpy.save(arrays())), arrays())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_way_in_which_torch_saves_a_tensor(tmp_path, legacy):
    path = written(tmp_path, torch_bytes(NAMED, legacy=legacy))
    check_same(path, {name: of_torch(tensor) for name, tensor in NAMED.items()})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol(tmp_path, protocol):
    state = {"a": NAMED["base"], "b": NAMED["turned"]}
    path = written(tmp_path, torch_bytes(state, protocol=protocol))
    check_same(path, {name: of_torch(tensor) for name, tensor in state.items()})


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dict_of_a_trainer_without_what_is_no_tensor(tmp_path, legacy):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "1.4",
        "callbacks": {torch.nn.Linear: {"best": None, "seen": {1, 2}, "path": Path("a")}},
        "optimizer_states": [optimizer.state_dict()],
        "rng": np.random.default_rng(0).bytes(8),
        "mean": np.float64(0.5),
        "state_dict": module.state_dict(),
    }
    path = written(tmp_path, torch_bytes(checkpoint, legacy=legacy))
    check_same(path, {name: of_torch(tensor) for name, tensor in module.state_dict().items()})


def test_tensors_of_dictionaries_in_dictionaries_are_named_by_both(tmp_path):
    vector = torch.arange(8.0).reshape(2, 4)
    path = written(tmp_path, torch_bytes({"ema": {"unet": {"w": vector}, 3: vector[0]}, "rest": [vector]}))
    check_same(path, {"ema.unet.w": of_torch(vector), "ema.3": of_torch(vector[0])})


@pytest.mark.parametrize("wrap", [dict, torch.nn.ParameterDict], ids=["A1111", "textual_inversion"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_vectors_of_an_embedding(tmp_path, legacy, wrap):
    vectors = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    embedding = {
        "string_to_token": {"*": 265},
        "string_to_param": wrap({"*": vectors}),
        "name": "cat",
        "step": 500,
        "sd_checkpoint": None,
    }
    path = written(tmp_path, torch_bytes(embedding, legacy=legacy))
    check_same(path, {"string_to_param.*": of_torch(vectors)})


def nested(named: Arrays) -> dict:
    tree: dict = {}
    for name, array in named.items():
        *above, last = name.split(".")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = array
    return tree


def test_flax_of_the_library(tmp_path):
    tree = nested(arrays()) | {"step": 3, "name": "cat"}
    check_same(written(tmp_path, flax.serialization.msgpack_serialize(tree)), arrays())


def test_flax_scalars_of_numpy_are_tensors(tmp_path):
    check_same(written(tmp_path, flax.serialization.msgpack_serialize({"a": np.float32(2)})), {"a": np.array(2, "f4")})


@pytest.mark.parametrize("limit", [8, 40, 64])
def test_flax_arrays_in_pieces(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", limit)
    content = flax.serialization.msgpack_serialize(nested(arrays()))
    assert content.count(b"__msgpack_chunked_array__") >= 4
    check_same(written(tmp_path, content), arrays())


def test_safetensors_written_are_those_of_the_library(tmp_path):
    path = tmp_path / "written"
    tensors = {name: of_array(array) for name, array in reversed(arrays().items())}
    write_safetensors(tensors, path)
    assert path.read_bytes() == safetensors.numpy.save(arrays(), metadata={"format": "pt"})
    assert metadata_of(path) == {"format": "pt"}
    check_same(path, arrays())


def test_writers_refuse_what_a_format_lacks(tmp_path):
    complex_ = {"a": of_array(np.zeros(2, np.complex128))}
    with refuses("a", "complex128"):
        write_safetensors(complex_, tmp_path / "file")
    with refuses("__metadata__"):
        write_safetensors({"__metadata__": of_array(np.zeros(2))}, tmp_path / "file")
    with refuses("a", "float64 [2]", "float64 [3]"):
        write_safetensors({"a": Tensor((3,), np.dtype("f8"), lambda: np.zeros(2))}, tmp_path / "file")


@pytest.mark.parametrize("content", small().values(), ids=small())
def test_tensors_are_read_when_they_are_asked_for(tmp_path, content):
    path = written(tmp_path, content)
    tensors = open_tensors(path)
    path.write_bytes(content[: len(content) // 8])
    assert {tensor.shape for tensor in tensors.values()} >= {(3, 4)}
    with refuses(str(path), "shorter"):
        [tensor.read() for tensor in tensors.values()]
    path.unlink()
    with refuses(str(path), "No such file"):
        next(iter(tensors.values())).read()


@pytest.mark.parametrize("content", small().values(), ids=small())
def test_blocks_are_those_of_the_whole(tmp_path, content):
    """Empty ones and those at both ends of the axes among them."""
    rng = np.random.default_rng(0)
    for tensor in open_tensors(written(tmp_path, content)).values():
        whole = tensor.read()
        half = tensor.rows(1, tensor.shape[0])
        for start, stop in [(0, 0), (3, 3), (0, 3), *np.sort(rng.integers(0, 5, (20, 2)))]:
            block = tuple(slice(min(start, n), min(stop, n)) for n in tensor.shape)
            np.testing.assert_array_equal(tensor[block], whole[block])
            np.testing.assert_array_equal(half[block], whole[1:][block])


@pytest.mark.parametrize("content", small().values(), ids=small())
def test_arrays_that_were_read_are_the_readers_own(tmp_path, content):
    tensor = open_tensors(written(tmp_path, content))["a.weight"]
    first = tensor.read()
    expected = first.copy()
    first[:] = 7
    np.testing.assert_array_equal(tensor.read(), expected)


FOREIGN = {
    "empty": (b"", "empty"),
    "web page": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "JSON": (b'{"weight_map": {}}', "JSON"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(600), "GGUF"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "gzip"),
    "tar": (bytes(257) + b"ustar\x0000" + bytes(300), "tar"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(50), re.compile(r"\bpicture|\bimage")),
    "ONNX": (b"\x08\x07\x12\x07pytorch", "ONNX"),
    "pickle": (b"\x80\x04}\x94.", "pickle"),
    "cut safetensors": (small()["safetensors"][:100], re.compile(r"safetensors.*; ")),
    "noise": (bytes(range(200, 256)) * 4, re.compile("known|recogni")),
    "no tensors": (torch_bytes({"epoch": 3}), "tensors"),
    "no dictionary": (torch_bytes([1]), "named"),
    "other msgpack": (msgpack.packb({"a": [1, 2]}), "tensors"),
}


@pytest.mark.parametrize("case", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_file_of_tensors_is_named(tmp_path, case):
    content, what = case
    text = refusal(written(tmp_path, content))
    says(text, "file.weights", what)
    one_sentence(text)


def test_archives_that_are_not_weights_are_named(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    says(refusal(tmp_path / "arrays.npz"), "arrays.npz", "torch.save")
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    says(refusal(tmp_path / "script.pt"), "script.pt", "torch.save")


def test_what_is_no_file_is_named(tmp_path):
    says(refusal(tmp_path), str(tmp_path), "folder", "file")
    says(refusal(tmp_path / "none"), str(tmp_path / "none"), "No such file")
    byte = r"embedded null byte|stat: embedded null character in path"  # the latter since Python 3.13
    says(refusal(tmp_path / "no\0ne"), re.compile(byte))
    os.mkfifo(tmp_path / "pipe")
    says(refusal(tmp_path / "pipe"), str(tmp_path / "pipe"), "regular file")


def test_torch_file_without_zip_begins_as_the_reader_thinks():
    assert small()["legacy"].startswith(LEGACY)


def test_types_of_other_machines_are_written_little_endian(tmp_path):
    path = tmp_path / "written"
    write_safetensors({"a": of_array(np.arange(3, dtype=">f4"))}, path)
    check_same(path, {"a": np.arange(3, dtype="<f4")})
    write_safetensors({"a": of_array(np.arange(3).astype(ml_dtypes.bfloat16)[::-1])}, path)
    check_same(path, {"a": np.array([2, 1, 0], ml_dtypes.bfloat16)})
