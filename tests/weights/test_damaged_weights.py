"""Safetensors files with random damage, and indexes that lead elsewhere: tensors or one sentence, in little memory."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from facts import refuses
from safetensors.numpy import save_file
from tensor_files import everything, small, written

from distrijax import json_config
from distrijax.convert.files import open_tensors
from distrijax.convert.layouts.folder import read_model
from distrijax.errors import DistriError
from distrijax.json_config import read_json
from distrijax.weights.files import weight_files

SPARE = 1 << 20
"""Bytes that a reader may take beside twice the file."""

EACH = 300
"""Damaged files."""


def damaged(content: bytes, other: bytes, random: random.Random) -> bytes:
    """The file after one to four changes. other: a file that pieces are taken from."""
    for _ in range(random.randint(1, 4)):
        at, end = sorted(random.randrange(len(content) + 1) for _ in range(2))
        length = min(end - at, random.choice((1, 2, 8, 64)))
        match random.randrange(6):
            case 0 if content:  # a bit
                at = random.randrange(len(content))
                content = content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
            case 1:  # cut off
                content = content[: max(end, len(content) // 2)]
            case 2:  # a piece is gone
                content = content[:at] + content[at + length :]
            case 3:  # a piece is there twice
                content = content[:end] + content[at : at + length] + content[end:]
            case 4:  # a piece of another file
                start = random.randrange(len(other))
                content = content[:at] + other[start : start + length] + content[at + length :]
            case _:  # a number that is large
                value = random.choice((b"\xff", b"\x7f", b"\0", b"\x80")) * random.choice((1, 2, 4, 8))
                content = content[:at] + value + content[at + len(value) :]
    return content


def outcomes(content: bytes, folder: Path, read: Callable[[Path], object]) -> Iterator[bool]:
    """Of each damaged file, whether it was read. Fails for anything but tensors or the sentence."""
    rng = random.Random(7)
    others = list(small().values())
    tracemalloc.start()
    try:
        for _ in range(EACH):
            path = written(folder, damaged(content, rng.choice(others), rng))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                read(path)
                yield True
            except DistriError as error:
                text = str(error)
                assert text.isprintable() and str(path) in text
                yield False
            assert tracemalloc.get_traced_memory()[1] - before < 2 * path.stat().st_size + SPARE
    finally:
        tracemalloc.stop()


def read_weights(path: Path) -> None:
    for tensor in open_tensors(path).values():
        assert everything(tensor).shape == tensor.shape


def test_damaged_files_of_a_model_give_tensors_or_a_sentence(tmp_path):
    whole = list(outcomes(small()["safetensors"], tmp_path, read_weights))
    assert 0 < sum(whole) < len(whole) - EACH // 4


def indexed(folder: Path, content: str) -> Path:
    (folder / "model.safetensors.index.json").write_text(content)
    return folder


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A good file beside the model's folder, and the folder."""
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    for place in (tmp_path, folder / "inner"):
        save_file({"a": np.zeros(2, np.float32)}, place / "other.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "{}/other.safetensors",
        "inner/other.safetensors",
        "..\\other.safetensors",
        "..",
        "",
        "a\0",
        "config.json",
        "\x1b.safetensors",
        "C:\\other.safetensors",
        "inner/../../other.safetensors",
    ],
)
def test_an_index_can_not_lead_out_of_its_folder(elsewhere, name):
    content = json.dumps({"weight_map": {"a": name.format(elsewhere.parent)}})
    with refuses("index.json", ".safetensors") as caught:
        weight_files(indexed(elsewhere, content))
    assert str(caught.value).isprintable()


def test_an_index_that_names_what_is_no_file(elsewhere):
    (elsewhere / "folder.safetensors").mkdir()
    os.mkfifo(elsewhere / "pipe.safetensors")
    for name in ("folder.safetensors", "pipe.safetensors", "none.safetensors"):
        indexed(elsewhere, json.dumps({"weight_map": {"a": name}}))
        with refuses(name):
            read_model(elsewhere)


JSON = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "long number": '{"a": ' + "1" * 10_000 + "}",
    "cut off": '{"weight_map": {',
    "list": "[]",
    "numbers for names": '{"weight_map": {"a": 3}}',
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_an_index_that_is_none(elsewhere, content):
    with refuses("index.json"):
        weight_files(indexed(elsewhere, content))


def test_json_is_not_read_beyond_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(json_config, "MAX_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": 345}')
    assert read_json(tmp_path / "a.json") == {"a": 345}
    (tmp_path / "a.json").write_text('{"a": 3456}')
    with refuses("a.json", 10):
        read_json(tmp_path / "a.json")
