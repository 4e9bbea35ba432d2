"""Orbax folders of unknown intent: arrays that orbax itself wrote, or one sentence; no zeros where data is missing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from facts import refuses, says
from tensor_files import read_all, sentence

from distrijax.convert.readers import orbax_guard
from distrijax.convert.readers.orbax_files import open_model
from distrijax.convert.readers.orbax_guard import ZSTD, check_unpacked
from distrijax.errors import DistriError

TREE = {
    "a": {"weight": np.arange(6000, dtype=np.float32).reshape(20, 300), "bias": np.zeros(3, np.float16)},
    "b.c": np.ones(5),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("orbax") / "model"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, TREE)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """One to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(DistriError) as caught:
        read_all(folder, open_model)
    return sentence(caught.value, folder)


@pytest.mark.parametrize("kind", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_what_orbax_writes_by_itself_is_read(tmp_path, kind):
    tree = {**TREE, "jax": jnp.arange(7, dtype=jnp.bfloat16), "empty": {}}
    with kind() as checkpointer:
        checkpointer.save(tmp_path / "model", tree)
    found = open_model(tmp_path / "model")
    wanted = {
        "a.weight": TREE["a"]["weight"],
        "a.bias": TREE["a"]["bias"],
        "b.c": TREE["b.c"],
        "jax": np.asarray(tree["jax"]),
    }
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        read = found[name].read()
        assert (read.dtype, read.tobytes()) == (array.dtype, array.tobytes())


def described(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "_METADATA").read_text())
        change(content)
        (folder / "_METADATA").write_text(json.dumps(content))

    return apply


def linked(folder: Path) -> None:
    (folder / "_sharding").unlink(missing_ok=True)
    (folder / "_sharding").symlink_to("/dev/zero")


DAMAGE = {
    "link": (linked, "_sharding"),
    "pipe": (lambda folder: os.mkfifo(folder / "d" / ("0" * 32)), "0000"),
    "linked folder": (lambda folder: (folder / "ocdbt.process_9").symlink_to(folder), "process_9"),
    "foreign file": (lambda folder: (folder / "run.sh").write_text(""), "run.sh"),
    "no manifest": (lambda folder: (folder / "manifest.ocdbt").unlink(), "manifest"),
    "no description": (lambda folder: (folder / "_METADATA").unlink(), "_METADATA"),
    "no data": (lambda folder: [path.unlink() for path in folder.rglob("d/*")], "orbax"),
    "deep": (lambda folder: (folder / "_METADATA").write_text("[" * 100_000), "orbax"),
    "text": (described(lambda held: held["tree_metadata"]["('b.c',)"]["value_metadata"].update(value_type="string")), "string"),
    "another name": (described(lambda held: held["tree_metadata"]["('b.c',)"]["key_metadata"][0].update(key="x")), "missing"),
    "zarr 3": (described(lambda held: held.update(use_zarr3=True)), "zarr 3"),
    "no tree": (described(lambda held: held.update(tree_metadata=3)), "orbax"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_folders_that_lie_are_refused(model, damage, message):
    damage(model)
    assert message in refusal(model)


def test_a_link_to_a_folder_is_not_followed(model, tmp_path):
    (tmp_path / "linked").symlink_to(model)
    says(refusal(tmp_path / "linked"), "link")


def test_a_description_too_long_is_not_read(model, monkeypatch):
    monkeypatch.setattr(orbax_guard, "SMALL", 100)
    says(refusal(model), re.compile(r"\d\d\d bytes"))


ARRAYS = {
    "huge": {"shape": [2**40], "chunks": [2**40]},
    "huge chunk": {"chunks": [2**40]},
    "many chunks": {"shape": [2**40], "chunks": [1]},
    "no chunks": {"chunks": [0]},
    "texts": {"shape": ["a"]},
    "objects": {"dtype": "|O"},
    "a filter": {"filters": [{"id": "x"}]},
}


@pytest.mark.parametrize("change", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_announce_too_much_are_refused(model, change):
    rewritten(model, "b.c/.zarray", lambda text: json.dumps(json.loads(text) | change).encode())
    refusal(model)


def test_a_chunk_that_is_missing_is_no_zeros(model):
    rewritten(model, "b.c/0", lambda _: None)
    says(refusal(model), "'b.c/0'")


def frame(blocks: int) -> bytes:
    """Blocks of 128 KB of zeros, four bytes each."""
    run = [(128 << 10 << 3 | 2 | (number == blocks - 1)).to_bytes(3, "little") + b"\0" for number in range(blocks)]
    return ZSTD + b"\x00\x58" + b"".join(run)


def test_a_chunk_that_becomes_very_much_is_not_unpacked(model):
    rewritten(model, "b.c/0", lambda _: frame(10_000))
    says(refusal(model), "bytes", 40)


def test_a_node_that_becomes_very_much_is_not_unpacked(model):
    packed = frame(1000)
    node = b"\x0c\xdb\x20\xde" + (len(packed) + 18).to_bytes(8, "little") + b"\0\1" + packed + bytes(4)
    (model / "d" / ("0" * 32)).write_bytes(bytes(77) + node)
    says(refusal(model), f"{len(packed)} bytes")


def test_blocks_are_counted_over_all_frames():
    check_unpacked(frame(3) * 2, 6 * 128 << 10)
    with refuses("bytes", 6 * 128 << 10, error=ValueError):
        check_unpacked(frame(3) * 3, 6 * 128 << 10)


def test_of_blocks_that_do_not_tell_their_size_there_are_at_most_four_times_as_many():
    def packed(blocks: int) -> bytes:
        run = [(1 << 3 | 2 << 1 | (number == blocks - 1)).to_bytes(3, "little") + b"\0" for number in range(blocks)]
        return ZSTD + b"\x00\x58" + b"".join(run)

    check_unpacked(packed(4 * 7), 6 * 128 << 10)  # one may be cut off
    with refuses("bytes", 6 * 128 << 10, error=ValueError):
        check_unpacked(packed(4 * 7 + 1), 6 * 128 << 10)


def rewritten(folder: Path, key: str, change: Callable[[bytes], bytes | None]) -> None:
    """Changes a value of the tree, by the library."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    store.write(key, change(store.read(key).result().value)).result()


def test_folders_with_random_damage_give_arrays_or_a_sentence(saved, tmp_path):
    rng = random.Random(3)
    whole = 0
    for number in range(60):
        folder = shutil.copytree(saved, tmp_path / f"{number}")
        path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        content = bytearray(path.read_bytes())
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content[: rng.choice((at, len(content)))])
        try:
            read_all(folder, open_model)
            whole += 1
        except DistriError:
            pass
        shutil.rmtree(folder)
    assert 0 < whole < 60
