"""Files that were made to harm, and real files with damage: one sentence, nothing executed, little memory taken."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile

import flax.serialization
import numpy as np
import pytest
import torch
from facts import says
from tensor_files import SPARE, read_all, refusal, small, torch_bytes, written

from distrijax.convert.readers import pickles


class Harm:
    """What pickle makes of it is a call."""

    def __init__(self, function, *arguments):
        self.made_of = function, arguments

    def __reduce__(self):
        return self.made_of


def zipped(pickled: bytes, *, method: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **entries}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def legacy(pickled: bytes, keys: object = (), rest: bytes = b"") -> bytes:
    head = small()["legacy"]
    state = torch_bytes({}, legacy=True)
    assert head[:13] == state[:13]
    before = state[: state.rindex(b"\x80\x02}q\x00.")]
    return before + pickled + pickle.dumps(list(keys), 2) + rest


def pickled(content: object, protocol: int = 2) -> bytes:
    return pickle.dumps(content, protocol)


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

CALLS = {
    "os.system": Harm(os.system, "echo harm > harmed"),
    "exec": Harm(exec, "open('harmed', 'w')"),
    "getattr": Harm(getattr, os, "system"),
    "open": Harm(open, "harmed", "w"),
    "deep inside": {"state_dict": {"a": [({"b": Harm(os.mkdir, "harmed")},)]}},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("content", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("form", [zipped, legacy])
def test_nothing_in_a_pickle_is_called(tmp_path, monkeypatch, form, content, protocol):
    monkeypatch.chdir(tmp_path)
    text = refusal(written(tmp_path, form(pickled(content, protocol) if content is not CALLS["getattr"] else GETATTR)))
    says(text, "pickle", "safetensors", re.compile(r"system|exec|getattr|open|mkdir"))
    assert [path.name for path in tmp_path.iterdir()] == ["file.weights"]


GETATTR = b"\x80\x02c__builtin__\ngetattr\ncos\nX\6\0\0\0system\x86R."
"""A module can't be pickled, so this is written by hand."""


@pytest.mark.parametrize("name", [b"torch.hub\nload", b"numpy.testing._private.utils\nrunstring", b"torch\nload"])
def test_functions_of_packages_that_checkpoints_name_are_not_called_either(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = b"\x80\x02}X\1\0\0\0ac" + name + b"\nX\6\0\0\0harmed\x85Rs."
    says(refusal(written(tmp_path, zipped(content))), "tensors", "safetensors", "torch.save")
    assert [path.name for path in tmp_path.iterdir()] == ["file.weights"]


def test_names_out_of_a_pickle_are_fit_to_be_printed(tmp_path):
    text = refusal(written(tmp_path, zipped(b"\x80\x02c\x1b[2Jos\nsys\rtem\n.")))
    says(text, "pickle", "safetensors")


def test_reading_what_is_described_by_hand_works(tmp_path):
    """The cases below differ from this in one thing each."""
    assert read_all(written(tmp_path, zipped(described(), **STORED))) == 1
    assert read_all(written(tmp_path, legacy(described(), ["0"], struct.pack("<q3f", 3, 1, 2, 3)))) == 1


LIES = {
    "huge shape": described(shape=number(2**47) + b"\x85"),
    "huge product": described(shape=number(2**40) + number(2**40) + b"\x86", strides=b"K\1K\1\x86"),
    "huge shape of nothing apart": described(shape=number(2**47) + b"\x85", strides=b"K\0\x85"),
    "huge storage": described(count=number(2**47)),
    "both": described(shape=number(2**40) + b"\x85", count=number(2**40)),
    "endless number": described(count=b"\x8b\xff\xff\xff\x7f"),
    "negative shape": described(shape=number(-3) + b"\x85"),
    "negative stride": described(strides=number(-1) + b"\x85"),
    "negative start": described(start=number(-1)),
    "start beyond": described(start=b"K\1"),
    "stride beyond": described(strides=b"K\2\x85"),
    "strides of another rank": described(strides=b"K\1K\1\x86"),
    "shape of texts": described(shape=b"X\1\0\0\0003\x85"),
    "shape of truths": described(shape=b"\x88\x85"),
    "no shape": described(shape=b"N"),
    "fractions": described(shape=b"G\x40\x08\0\0\0\0\0\0\x85"),
    "many dimensions": described(shape=b"(" + b"K\1" * 40 + b"t", strides=b"(" + b"K\1" * 40 + b"t"),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_sizes_are_checked_before_memory_is_taken_for_a_tensor(tmp_path, form, content):
    rest = struct.pack("<q3f", 3, 1, 2, 3)
    file = zipped(content, **STORED) if form == "zip" else legacy(content, ["0"], rest)
    says(refusal(written(tmp_path, file)), "torch")


@pytest.mark.parametrize("count", [2, 4, 2**40, 2**61, 2**63 - 1])
def test_storages_of_older_files_that_claim_another_size(tmp_path, count):
    rest = struct.pack("<Q3f", count, 1, 2, 3)
    refusal(written(tmp_path, legacy(described(), ["0"], rest)))
    refusal(written(tmp_path, legacy(described(count=number(count)), ["0"], rest)))


MACHINES = {
    "a dictionary that holds itself": b"\x80\x02}q\0X\1\0\0\0ah\0s.",
    "dictionaries that hold each other": b"\x80\x02}q\0X\1\0\0\0a}q\1X\1\0\0\0bh\0ss.",
    "a state_dict that is its own": b"\x80\x02}q\0X\n\0\0\0state_dicth\0s.",
    "a dictionary in many places": b"\x80\x02}q\0(" + b"".join(b"K%c}h\0s" % n for n in range(1, 9)) + b"u.",
    "deep tuples": b"\x80\x02}X\1\0\0\0a" + b"N" + b"\x85" * 30_000 + b"s.",
    "deep dictionaries": b"\x80\x02" + b"}X\1\0\0\0a" * 1000 + b"N" + b"s" * 1000 + b".",
    "a key that is long": b"\x80\x02}\x8a\xff" + b"\x7f" * 255 + b"Ns.",
    "text longer than the file": b"\x80\x02}X\xff\xff\xff\x7fa",
    "bytes longer than the file": b"\x80\x04}\x8e" + struct.pack("<Q", 2**62) + b"a",
    "array longer than the file": b"\x80\x05}\x96" + struct.pack("<Q", 2**62) + b"a",
    "an empty stack": b"\x80\x02.",
    "no mark": b"\x80\x02u.",
    "no memo": b"\x80\x02h\7.",
    "no end": b"\x80\x02}",
    "half of a text": b"\x80\x02}X\7\0\0\0abc",
    "no instruction": b"\x80\x02\xff.",
    "an odd escape": b"\x80\x02}S'\\z'\nNs.",
    "an extension": b"\x80\x02\x82\1.",
    "not UTF-8": b"\x80\x02}X\2\0\0\0\xff\xfeNs.",
}


@pytest.mark.parametrize("content", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("form", [zipped, legacy])
def test_pickles_that_are_meant_to_confuse(tmp_path, form, content):
    refusal(written(tmp_path, form(content)))


def test_many_long_names_that_share_a_beginning_take_no_memory(tmp_path):
    """A name of 64 KB before each of 10,000 tensors would be 640 MB."""
    inner = b"".join(b"M" + struct.pack("<H", n) + b"h\1" for n in range(10_000))
    tensor = described().removeprefix(b"\x80\x02}X\1\0\0\0a").removesuffix(b"s.")
    prefix = b"X" + struct.pack("<I", 65536) + b"a" * 65536
    text = refusal(
        written(tmp_path, zipped(b"\x80\x02}" + tensor + b"q\1" + b"0" + prefix + b"}(" + inner + b"us.", **STORED))
    )
    says(text, "characters")


def long(number: int) -> bytes:
    return b"\x8a\x0a" + number.to_bytes(10, "little")


TEXT = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
SLOW = {
    "keys of one hash": b"}(" + b"".join(long(n * (2**61 - 1)) + b"N" for n in range(20_000)) + b"u.",
    "memo of one hash": b"}" + b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(20_000)) + b".",
    "a name again and again": TEXT.replace(b"aaaaaa", b"torch.", 1) + b"q\0" + b"h\0h\0\x930" * 50_000 + b"}.",
    "a storage again and again": b"ctorch\nFloatStorage\nq\0ctorch._utils\n_rebuild_tensor_v2\nq\2"
    + b"((h\0h\0X\1\0\0\0000NK\1" + b"N" * 200_000 + b"tQK\0K\1\x85K\1\x85tq\1" + b"h\2h\1R0" * 20_000 + b"}.",
    "a beginning again and again": b"}(" + TEXT + b"}(" + b"".join(b"J%bN" % struct.pack("<i", n) for n in range(50_000)) + b"uu.",
    "parameters again and again": b"ctorch.nn.modules.container\nParameterDict\nq\0)\x81q\1}X\x0b\0\0\0_parameters}("
    + b"".join(b"J%bN" % struct.pack("<i", n) for n in range(50_000)) + b"usq\2" + b"h\1h\2b0" * 20_000 + b"}.",
}  # fmt: skip


@pytest.mark.parametrize("content", SLOW.values(), ids=SLOW)
def test_what_costs_the_file_little_costs_the_reader_little(tmp_path, content):
    """The time would go with the square of the file's size, and be hours at the sizes allowed."""
    refusal(written(tmp_path, zipped(b"\x80\x02" + content)), within=5, spare=20 * SPARE)


def test_one_name_for_two_tensors(tmp_path):
    tensor = torch.zeros(2)
    says(refusal(written(tmp_path, torch_bytes({"1": tensor, 1: tensor}))), "'1'")
    says(refusal(written(tmp_path, torch_bytes({"a.b": tensor, "a": {"b": tensor}}))), "'a.b'")
    arrays = {"a": {"b": np.zeros(2)}, "a.b": np.zeros(2)}
    says(refusal(written(tmp_path, flax.serialization.msgpack_serialize(arrays))), "'a.b'")


def test_a_name_that_is_no_text(tmp_path):
    says(refusal(written(tmp_path, torch_bytes({"\ud800": torch.zeros(2)}))), "surrogates")


def test_a_pickle_that_makes_much_of_each_byte_is_given_up(tmp_path, monkeypatch):
    """A dictionary for each byte: what may be taken is 100 MB, tried here with a tenth of that."""
    monkeypatch.setattr(pickles, "INSTRUCTIONS", pickles.INSTRUCTIONS // 10)
    content = b"\x80\x02" + b"}" * 1_000_000 + b"."
    says(refusal(written(tmp_path, zipped(content)), spare=10 << 20), 100_000, "instructions")


def test_archives_that_are_packed_are_not_unpacked(tmp_path):
    bomb = zipped(described(), method=zipfile.ZIP_DEFLATED, **{"data/0": bytes(50 << 20)})
    assert len(bomb) < 100_000
    says(refusal(written(tmp_path, bomb)), "compressed")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", described(shape=number(10 << 20) + b"\x85", count=number(10 << 20)))
        archive.writestr("archive/data/0", bytes(40 << 20), zipfile.ZIP_DEFLATED)
    says(refusal(written(tmp_path, file.getvalue())), "compressed")


def test_one_storage_for_more_tensors_than_the_file_could_hold(tmp_path):
    storage = torch.zeros(1000)
    state = {str(n): storage for n in range(500)}
    content = torch_bytes(state)
    says(refusal(written(tmp_path, content)), 4, len(content))


def test_entries_of_an_archive_that_lie_elsewhere(tmp_path):
    good = zipped(described(), **STORED)
    entry = good.rindex(b"PK\1\2")
    for field, value in ((42, 2**31), (42, 3), (20, 2**31), (24, 2**31), (28, 65535), (30, 65535), (32, 65535)):
        bad = bytearray(good)
        width = "<H" if field in (28, 30, 32) else "<I"
        struct.pack_into(width, bad, entry + field, value)
        refusal(written(tmp_path, bytes(bad)))
    end = good.rindex(b"PK\5\6")
    for field, value in ((12, 2**31), (12, 0), (16, 2**31), (16, 0), (12, 2**32 - 1)):
        bad = bytearray(good)
        struct.pack_into("<I", bad, end + field, value)
        refusal(written(tmp_path, bytes(bad)))


def test_an_archive_with_a_name_twice(tmp_path):
    content = zipped(described(), **{"data.pk2": described()}).replace(b"data.pk2", b"data.pkl")
    says(refusal(written(tmp_path, content)), "archive/data.pkl")


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
    assert read_all(written(tmp_path, without_crc(zipped(described(), **STORED)))) == 1


def without_crc(archive: bytes) -> bytes:
    changed = bytearray(archive)
    at = archive.find(b"PK\1\2")
    while at >= 0:
        changed[at + 16 : at + 20] = bytes(4)
        at = archive.find(b"PK\1\2", at + 1)
    return bytes(changed)
