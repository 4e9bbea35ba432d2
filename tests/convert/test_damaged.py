"""Files that are damaged, are something else, or would run code: one sentence, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import zipfile

import flax.serialization
import msgpack
import numpy as np
import pytest
import torch
from facts import says
from original_layouts import original, unread
from tensor_files import read_all, refusal, small, torch_bytes, written

from distrijax.convert.layouts.original import from_original
from distrijax.weights.tensors import of_array


class Harm:
    """An object that pickle restores by a call."""

    def __init__(self, function, *arguments):
        self.made_of = function, arguments

    def __reduce__(self):
        return self.made_of


def zipped(pickled: bytes, *, method: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    """An archive such as torch writes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **entries}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def legacy(pickled: bytes, keys: object = (), rest: bytes = b"") -> bytes:
    """A file such as torch before 1.6 wrote."""
    state = torch_bytes({}, legacy=True)
    before = state[: state.rindex(b"\x80\x02}q\x00.")]
    return before + pickled + pickle.dumps(list(keys), 2) + rest


CALLS = {
    "os.system": Harm(os.system, "echo harm > harmed"),
    "exec": Harm(exec, "open('harmed', 'w')"),
    "open": Harm(open, "harmed", "w"),
    "deep inside": {"state_dict": {"a": [({"b": Harm(os.mkdir, "harmed")},)]}},
}
GETATTR = b"\x80\x02c__builtin__\ngetattr\ncos\nX\6\0\0\0system\x86R."
"""A module can't be pickled, so this is written by hand."""

PICKLES = {f"{name} {protocol}": pickle.dumps(CALLS[name], protocol) for name in CALLS for protocol in (2, 4)}


@pytest.mark.parametrize("content", [*PICKLES.values(), GETATTR], ids=[*PICKLES, "getattr"])
@pytest.mark.parametrize("form", [zipped, legacy])
def test_nothing_in_a_pickle_is_called(tmp_path, monkeypatch, form, content):
    monkeypatch.chdir(tmp_path)
    text = refusal(written(tmp_path, form(content)))
    says(text, "pickle", "safetensors", re.compile(r"system|exec|getattr|open|mkdir"))
    assert [path.name for path in tmp_path.iterdir()] == ["file.weights"]


@pytest.mark.parametrize("name", [b"torch.hub\nload", b"numpy.testing._private.utils\nrunstring", b"torch\nload"])
def test_functions_of_packages_that_checkpoints_name_are_not_called_either(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = b"\x80\x02}X\1\0\0\0ac" + name + b"\nX\6\0\0\0harmed\x85Rs."
    says(refusal(written(tmp_path, zipped(content))), "tensors", "safetensors", "torch.save")
    assert [path.name for path in tmp_path.iterdir()] == ["file.weights"]


def test_names_out_of_a_pickle_are_fit_to_be_printed(tmp_path):
    says(refusal(written(tmp_path, zipped(b"\x80\x02c\x1b[2Jos\nsys\rtem\n."))), "pickle", "safetensors")


def described(
    shape: bytes = b"K\x03\x85", strides: bytes = b"K\x01\x85", count: bytes = b"K\x03", start=b"K\0"
) -> bytes:
    """The pickle of {"a": a tensor}, its numbers as given. They are instructions, by default 3 elements."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu" + count + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + start + shape + strides + b"\x89}tR"
    return b"\x80\x02}X\1\0\0\0a" + tensor + b"s."


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


STORED = {"data/0": struct.pack("<3f", 1, 2, 3)}


def test_reading_what_is_described_by_hand_works(tmp_path):
    """The cases below differ from this in one thing each."""
    assert read_all(written(tmp_path, zipped(described(), **STORED))) == 1
    assert read_all(written(tmp_path, legacy(described(), ["0"], struct.pack("<q3f", 3, 1, 2, 3)))) == 1


SIZES = {
    "huge shape": described(shape=number(2**47) + b"\x85"),
    "huge product": described(shape=number(2**40) + number(2**40) + b"\x86", strides=b"K\1K\1\x86"),
    "huge shape of one element": described(shape=number(2**47) + b"\x85", strides=b"K\0\x85"),
    "huge storage": described(count=number(2**47)),
    "both": described(shape=number(2**40) + b"\x85", count=number(2**40)),
    "negative shape": described(shape=number(-3) + b"\x85"),
    "negative stride": described(strides=number(-1) + b"\x85"),
    "negative start": described(start=number(-1)),
    "start beyond": described(start=b"K\1"),
    "stride beyond": described(strides=b"K\2\x85"),
    "strides of another rank": described(strides=b"K\1K\1\x86"),
    "no shape": described(shape=b"N"),
}


@pytest.mark.parametrize("content", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_sizes_of_a_pickle_are_checked_before_memory_is_taken_for_a_tensor(tmp_path, form, content):
    rest = struct.pack("<q3f", 3, 1, 2, 3)
    file = zipped(content, **STORED) if form == "zip" else legacy(content, ["0"], rest)
    says(refusal(written(tmp_path, file)), re.compile("torch|whole"))


@pytest.mark.parametrize("count", [2, 4, 2**40, 2**63 - 1])
def test_storages_of_older_files_that_claim_another_size(tmp_path, count):
    rest = struct.pack("<Q3f", count, 1, 2, 3)
    refusal(written(tmp_path, legacy(described(), ["0"], rest)))
    refusal(written(tmp_path, legacy(described(count=number(count)), ["0"], rest)))


def test_one_storage_for_more_tensors_than_the_file_could_hold(tmp_path):
    storage = torch.zeros(1000)
    content = torch_bytes({str(n): storage for n in range(500)})
    says(refusal(written(tmp_path, content)), 4, len(content))


def test_one_name_for_two_tensors(tmp_path):
    tensor = torch.zeros(2)
    says(refusal(written(tmp_path, torch_bytes({"1": tensor, 1: tensor}))), "'1'")
    says(refusal(written(tmp_path, torch_bytes({"a.b": tensor, "a": {"b": tensor}}))), "'a.b'")
    arrays = {"a": {"b": np.zeros(2)}, "a.b": np.zeros(2)}
    says(refusal(written(tmp_path, flax.serialization.msgpack_serialize(arrays))), "'a.b'")


@pytest.mark.parametrize("part", [b"a.weight", struct.pack("<f", 3.5)], ids=["pickle", "storage"])
def test_bytes_that_changed_are_told_by_their_checksum(tmp_path, part):
    good = torch_bytes({"a.weight": torch.arange(8).float() + 0.5})
    assert good.count(part) == 1
    says(refusal(written(tmp_path, good.replace(part, part[::-1]))), "CRC-32")


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        content = torch_bytes({"a.weight": torch.arange(8).float(), "a.bias": torch.zeros(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_all(written(tmp_path, content)) == 2


def test_archives_that_are_compressed_are_refused(tmp_path):
    says(refusal(written(tmp_path, zipped(described(), method=zipfile.ZIP_DEFLATED, **STORED))), "compressed")


@pytest.mark.parametrize("content", small().values(), ids=small())
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_download_that_was_cut_off_gives_a_sentence(tmp_path, content, part):
    refusal(written(tmp_path, content[: int(part * len(content))]))


def headed(header: object, data: bytes = bytes(12)) -> bytes:
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape=(3,), begin: int = 0, end: int = 12, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "overlapping": headed({"a": entry(), "b": entry(begin=0)}),
    "overlong": headed({"a": entry(end=2**40)}),
    "rest": headed({"a": entry((2,), 0, 8)}),
    "huge shape": headed({"a": entry((2**62, 2**62))}),
    "another size": headed({"a": entry((4,))}),
    "unknown type": headed({"a": entry(dtype="F13")}),
    "type without an array's": headed({"a": entry((24,), dtype="F4")}),
    "no entry": headed({"a": 3}),
    "no JSON": headed(b"{nothing}"),
    "header beyond the file": (2**40).to_bytes(8, "little") + b"{}",
    "header longer than any": headed(b'{"__metadata__":{"a":"%b"}}' % (b" " * (17 << 20))),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_safetensors_headers_that_are_wrong(tmp_path, content):
    refusal(written(tmp_path, content))


def array(shape: list, kind: str = "float32", data: bytes = bytes(12)) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, kind, data), use_bin_type=True))


def chunked(shape: dict, chunks: dict) -> dict:
    return {"a": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}}


TREES = {
    "huge shape": {"a": array([2**47])},
    "negative shape": {"a": array([-3])},
    "another size": {"a": array([4])},
    "unknown type": {"a": array([3], "float13")},
    "no shape": {"a": msgpack.ExtType(1, msgpack.packb(None))},
    "pieces of another size": chunked({"0": 2**40}, {"0": array([3])}),
    "pieces of two types": chunked({"0": 6}, {"0": array([3]), "1": array([3], "int32")}),
    "no pieces": chunked({"0": 0}, {}),
}


@pytest.mark.parametrize("content", TREES.values(), ids=TREES)
def test_flax_files_that_are_wrong(tmp_path, content):
    refusal(written(tmp_path, msgpack.packb(content, use_bin_type=True)))
    refusal(written(tmp_path, msgpack.packb({"a": array([3])}) + b"\0"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1j])
def test_a_training_step_that_is_no_number(value):
    tensors = unread(original("sd2")) | {"global_step": of_array(np.array([value]))}
    assert from_original(tensors, "file").configs["scheduler"]["prediction_type"] == "v_prediction"
