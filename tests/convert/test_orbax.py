"""Orbax checkpoints: the same bytes come back, a tensor at a time; what is not one is told in a sentence."""

from __future__ import annotations

import dataclasses
import shutil
import weakref

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from facts import refuses

from distrijax.convert.layouts.folder import from_folder, write_folder
from distrijax.convert.readers import orbax_files
from distrijax.convert.readers.orbax_files import open_orbax, write_orbax
from distrijax.convert.readers.safetensors_files import DTYPES
from distrijax.weights.tensors import Tensor, Tensors, of_array

FAMILIES = ("xl", 1, 2)


@pytest.fixture(scope="module")
def written(checkpoints, tmp_path_factory):
    """Stable Diffusion 1.x in orbax; copy it before changing it."""
    folder = tmp_path_factory.mktemp("orbax") / "sd1"
    write_folder(checkpoints[1], folder, orbax=True)
    return folder


def check_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        array = found[name].read()
        assert (array.shape, array.dtype) == (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert array.tobytes() == tensor.read().tobytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_comes_back_with_all_that_it_had(checkpoints, family, tmp_path):
    checkpoint = checkpoints[family]
    few = {part: dict(list(tensors.items())[::20]) for part, tensors in checkpoint.tensors.items()}
    write_folder(dataclasses.replace(checkpoint, tensors=few), tmp_path / "orbax", orbax=True)
    found = from_folder(tmp_path / "orbax")
    assert (found.index, found.configs, found.files) == (checkpoint.index, checkpoint.configs, checkpoint.files)
    assert found.tensors.keys() == few.keys()
    for part, tensors in few.items():
        check_same(found.tensors[part], tensors)


def test_orbax_reads_a_model_as_its_own(checkpoints, written):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        held = checkpointer.restore(written / "vae" / "orbax")
    tensors = checkpoints[1].tensors["vae"]
    assert held.keys() == tensors.keys()
    assert all(np.asarray(held[name]).tobytes() == tensor.read().tobytes() for name, tensor in tensors.items())


def test_every_type_of_tensor_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t.{name}": of_array(rng.integers(0, 2, (2, 3)).astype(dtype)) for name, dtype in DTYPES.items()}
    tensors["ids"] = of_array(np.array([[2**40, -1]]))
    tensors["scalar"] = of_array(np.array(1.5, ml_dtypes.bfloat16))
    tensors["transposed"] = of_array(rng.normal(size=(3, 4, 5, 2)).transpose(3, 2, 0, 1))
    write_orbax(tensors, tmp_path / "orbax")
    check_same(open_orbax(tmp_path / "orbax"), tensors)


@pytest.mark.parametrize("kind", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_what_orbax_writes_by_itself_is_read(tmp_path, kind):
    weight, bias = np.arange(6000, dtype=np.float32).reshape(20, 300), np.zeros(3, np.float16)
    tree = {
        "a": {"weight": weight, "bias": bias},
        "b.c": np.ones(5),
        "jax": jnp.arange(7, dtype=jnp.bfloat16),
        "no": {},
    }
    with kind() as checkpointer:
        checkpointer.save(tmp_path / "model", tree)
    wanted = {"a.weight": weight, "a.bias": bias, "b.c": tree["b.c"], "jax": np.asarray(tree["jax"])}
    check_same(open_orbax(tmp_path / "model"), {name: of_array(array) for name, array in wanted.items()})


def test_what_is_no_array_is_refused(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", {"a": np.ones(3), "name": "text"})
    with refuses(str(tmp_path / "model"), "orbax"):
        open_orbax(tmp_path / "model")


def test_no_more_than_a_batch_is_in_memory_while_it_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(orbax_files, "BATCH", 3 * 400)
    alive: list[weakref.ref] = []
    most = 0

    def read() -> np.ndarray:
        nonlocal most
        array = np.full(100, len(alive), np.float32)
        alive.append(weakref.ref(array))
        most = max(most, sum(each() is not None for each in alive))
        return array

    tensors = {f"{n:02}": Tensor((100,), np.dtype(np.float32), read) for n in range(20)}
    write_orbax(tensors, tmp_path / "orbax")
    assert len(alive) == 20
    assert 3 <= most <= 6  # the last batch goes when the next is whole
    found = open_orbax(tmp_path / "orbax")
    assert [found[f"{n:02}"].read()[0] for n in range(20)] == list(range(20))


def test_nothing_is_read_before_it_is_asked_for(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "orbax")
    tensors = from_folder(folder).tensors["vae"]
    name = "decoder.conv_in.weight"
    block = (slice(5, 9), slice(1, 2), slice(None), slice(None))
    np.testing.assert_array_equal(tensors[name][block], tensors[name].read()[block])
    shutil.rmtree(folder / "vae")
    assert tensors[name].shape == (32, 4, 3, 3)
    with refuses(str(folder / "vae"), "orbax"):
        tensors[name].read()


def test_data_that_is_cut_off_is_told(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "orbax")
    tensors = from_folder(folder).tensors["text_encoder"]
    for data in (folder / "text_encoder").rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with refuses(str(folder / "text_encoder"), "orbax"):
        tensors["text_model.embeddings.token_embedding.weight"].read()


def test_a_tensor_without_elements_is_refused_before_anything_is_written(tmp_path):
    with refuses("v_pred", "elements"):
        write_orbax({"v_pred": of_array(np.zeros(0, np.float32))}, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
