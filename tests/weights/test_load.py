"""Checkpoints: what is written is read back, in every form of the files, a tensor at a time, and whole or not at all."""

from __future__ import annotations

import json
import re
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from facts import refuses
from flax import nnx
from safetensors.numpy import load_file, save_file
from tensor_files import everything

from distrijax.convert.layouts.folder import read_model
from distrijax.convert.readers.safetensors_files import write_safetensors
from distrijax.json_config import read_json
from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.layers import Conv, Embedding, GroupNorm, Linear, abstract
from distrijax.weights.files import check_variant, weight_files
from distrijax.weights.load import finite, load_module, save_module
from distrijax.weights.tensors import of_array

STEM = "diffusion_pytorch_model"


class Small(nnx.Module):
    """Every kind of parameter that a checkpoint can hold."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = Conv(3, 5, rngs=rngs)
        self.blocks = nnx.List([Linear(4, 6, rngs=rngs), Linear(6, 4, bias=False, rngs=rngs)])
        self.norm = GroupNorm(8, 2, 1e-5)
        self.table = Embedding(7, 4, rngs=rngs)


@pytest.fixture
def module() -> Small:
    module = Small(rngs=nnx.Rngs(3))
    module.norm.scale.set_value(jnp.arange(8, dtype=jnp.float32))
    module.conv.bias.set_value(jnp.arange(5, dtype=jnp.float32))
    return module


@pytest.fixture
def folder(module, tmp_path):
    save_module(module, {"_class_name": "Small"}, tmp_path / "small", stem=STEM, dtype=np.float32)
    return tmp_path / "small"


def load(
    folder, *, variant=None, dtype=jnp.float32, place=lambda path, values: jnp.asarray(everything(values)), build=Small
):
    return load_module(abstract(build), read_model(folder, variant=variant), str(folder), dtype=dtype, place=place)


def leaves(module) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def assert_same(one, other) -> None:
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path])


def rewrite(folder, change) -> None:
    """Changes the tensors of a checkpoint by name."""
    file = folder / f"{STEM}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_what_is_saved_is_loaded(module, folder):
    assert_same(load(folder), module)
    assert read_json(folder / "config.json") == {"_class_name": "Small"}


def test_files_have_pytorchs_names_and_layouts(module, folder):
    tensors = load_file(folder / f"{STEM}.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "conv.weight": (5, 3, 3, 3),
        "conv.bias": (5,),
        "blocks.0.weight": (6, 4),
        "blocks.0.bias": (6,),
        "blocks.1.weight": (4, 6),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "table.weight": (7, 4),
    }
    kernel = np.asarray(module.conv.kernel.get_value())
    np.testing.assert_array_equal(tensors["conv.weight"][4, 2, 0, 1], kernel[0, 1, 2, 4])


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("before", [True, False], ids=["index.fp16.json", "fp16.index.json"])
def test_shards_named_by_an_index_are_loaded(module, folder, variant, before):
    tensors = load_file(folder / f"{STEM}.safetensors")
    (folder / f"{STEM}.safetensors").unlink()
    middle = f".{variant}" if variant else ""
    where = {name: f"{STEM}{middle}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    index = f"{STEM}.safetensors.index{middle}.json" if before else f"{STEM}.safetensors{middle}.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert len(weight_files(folder, variant)) == 2
    assert_same(load(folder, variant=variant), module)


def test_variant_is_its_own_file_and_is_cast(module, folder):
    tensors = load_file(folder / f"{STEM}.safetensors")
    save_file({name: (2 * t).astype(np.float16) for name, t in tensors.items()}, folder / f"{STEM}.fp16.safetensors")
    assert_same(load(folder), module)
    short = load(folder, variant="fp16", dtype=jnp.bfloat16)
    for path, value in leaves(short).items():
        assert value.dtype == ml_dtypes.bfloat16
        wanted = (2 * leaves(module)[path]).astype(np.float16).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(value, wanted)


def test_plain_weights_take_the_place_of_a_variant_that_is_not_there(module, folder):
    assert_same(load(folder, variant="bf16"), module)
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.fp16.safetensors")
    for variant, told in ((None, ()), ("bf16", ("variant", "bf16"))):
        with refuses("small", "safetensors", f"{STEM}.fp16.safetensors", *told):
            load(folder, variant=variant)


def test_a_variant_of_no_part_is_refused_with_what_is_there(folder):
    def check(variant):
        check_variant(folder.parent, ("small", "second", "absent"), variant)

    (folder.parent / "second").mkdir()
    (folder.parent / "second" / "pytorch_model.fp16.bin").touch()
    check(None)
    check("fp16")
    with refuses("variant", "bf16", f"{STEM}.safetensors", "pytorch_model.fp16.bin"):
        check("bf16")


def test_host_holds_one_tensor_at_a_time(folder):
    """`place` counts how many of the arrays it was handed before are still alive."""
    alive: list[weakref.ref] = []
    most = []

    def owner(tensor: np.ndarray) -> np.ndarray:
        while isinstance(tensor.base, np.ndarray):
            tensor = tensor.base
        return tensor

    def place(path, values):
        tensor = everything(values)
        most.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(owner(tensor)))
        return jnp.array(tensor, copy=True)

    load(folder, place=place)
    assert len(most) == 8
    assert max(most) <= 1  # the one before may wait in the reader's hands until its next read


def test_every_tensor_goes_through_place(folder):
    device = jax.devices()[1]
    placed = load(folder, place=lambda path, values: jax.device_put(everything(values), device))
    assert {leaf.get_value().device for _, leaf in nnx.to_flat_state(nnx.state(placed))} == {device}


def test_blocks_are_those_of_the_parameters(module, folder):
    """Down to empty ones, at both ends of the axes."""
    wanted, rng = leaves(module), np.random.default_rng(0)

    def place(path, values):
        assert values.shape == wanted[path].shape
        ends = [(0, 0), *((n, n) for n in values.shape), *np.sort(rng.integers(0, 8, (20, 2)))]
        for start, stop in ends:
            block = tuple(slice(min(start, n), min(stop, n)) for n in values.shape)
            np.testing.assert_array_equal(values[block], wanted[path][block])
        return jnp.asarray(everything(values))

    load(folder, place=place)


def test_what_no_device_holds_is_not_read(module, folder):
    """A number that is not finite is found by who reads it."""
    rewrite(folder, lambda tensors: tensors["blocks.1.weight"].__setitem__((3, 5), np.nan))

    def reading(*block: slice):
        """A `place` that reads a block of that kernel alone, and all of the others."""
        return lambda path, values: jnp.asarray(
            values[block] if path == ("blocks", 1, "kernel") else everything(values)
        )

    for block in ((slice(5, 6), slice(0, 3)), (slice(0, 5), slice(3, 4))):
        loaded = load(folder, place=reading(*block))
        np.testing.assert_array_equal(loaded.blocks[1].kernel, module.blocks[1].kernel[block])
    with refuses("1 not finite (blocks.1.weight)"):
        load(folder, place=reading(slice(5, 6), slice(3, 4)))


OTHER = ["config.json", 1, "float64", "float32", "float16", "bfloat16"]


@pytest.mark.parametrize(
    ("kind", "bits", "told"),
    [
        ("F4", 4, ["F4"]),
        ("F6_E2M3", 6, ["F6_E2M3"]),
        ("F8_E8M0", 8, [*OTHER, "norm.bias", "float8_e8m0fnu"]),
        ("BOOL", 8, [*OTHER, "norm.bias", "bool"]),
        ("I16", 16, [*OTHER, "norm.bias", "int16"]),
        ("C64", 64, [*OTHER, "norm.bias", "complex64"]),
    ],
)
def test_weights_of_other_types_are_refused(folder, kind, bits, told):
    file = folder / f"{STEM}.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != "norm.bias"}
    save_file(tensors, folder / "other.safetensors")
    size = 8 * bits // 8
    header = json.dumps({"norm.bias": {"dtype": kind, "shape": [8], "data_offsets": [0, size]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    where = dict.fromkeys(tensors, "other.safetensors") | {"norm.bias": file.name}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with refuses(str(folder), *told):
        load(folder)


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_weights_of_8_bits_are_cast(module, folder, kind):
    file = folder / f"{STEM}.safetensors"
    tensors = {name: each.astype(kind) for name, each in load_file(file).items()}
    write_safetensors({name: of_array(each) for name, each in tensors.items()}, file)
    short = load(folder)
    for path, value in leaves(module).items():
        np.testing.assert_array_equal(leaves(short)[path], value.astype(kind).astype(np.float32))
    tensors["norm.bias"][3] = np.nan
    write_safetensors({name: of_array(each) for name, each in tensors.items()}, file)
    with refuses("1 not finite (norm.bias)"):
        load(folder)


def test_one_error_lists_everything_that_is_wrong_before_anything_is_read(folder):
    def spoil(tensors):
        del tensors["conv.bias"]
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["norm.bias"] = np.zeros(9, np.float32)
        tensors["blocks.0.bias"] = np.zeros(6, np.int32)

    rewrite(folder, spoil)
    told = [
        "1 missing (conv.bias)",
        "1 unexpected (extra.weight)",
        re.compile(r"\b1 [^;(]*shape[^;(]* \(norm\.bias [^;)]*\[9\] [^;)]*\[8\]"),
        re.compile(r"\b1 [^;(]*float64, float32, float16, bfloat16[^;(]* \(blocks\.0\.bias [^;)]*int32\)"),
    ]
    with refuses(*told):
        load(folder, place=None)


def test_one_error_lists_everything_that_is_not_finite(folder):
    def spoil(tensors):
        tensors["table.weight"][0, 0] = np.nan
        tensors["conv.weight"][0, 0, 0, 0] = np.inf

    rewrite(folder, spoil)
    with refuses(re.compile(r"\b2 not finite \(conv\.weight, table\.weight\)")):
        load(folder)


def test_kernels_of_another_shape_are_told_in_pytorchs_layout(folder):
    rewrite(folder, lambda tensors: tensors.update({"conv.weight": np.zeros((5, 3, 1, 1), np.float32)}))
    with refuses("conv.weight", "[5, 3, 1, 1]", "[5, 3, 3, 3]"):
        load(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    tensors = load_file(folder / f"{STEM}.safetensors")
    save_file({"conv.bias": tensors["conv.bias"]}, folder / "second.safetensors")
    where = dict.fromkeys(tensors, f"{STEM}.safetensors") | {"conv.bias": "second.safetensors"}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with refuses("conv.bias", "twice"):
        load(folder)


def test_missing_shard_is_named(folder):
    (folder / f"{STEM}.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"conv.bias": "gone.safetensors"}})
    )
    with refuses("gone.safetensors"):
        load(folder)


def test_truncated_file_is_named(folder):
    file = folder / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with refuses(str(file)):
        load(folder)


def test_many_missing_tensors_are_counted(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]])
    with refuses("7 missing"):
        load(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite(dtype, bad):
    values = np.array([0, -1, 1e-7, np.finfo(np.float16).max], np.float64).astype(dtype)
    assert finite(values)
    values[2] = bad
    assert not finite(values)


def test_text_encoder_without_its_prefix_is_loaded(tmp_path):
    """transformers 5 writes CLIPTextModel's names without `text_model.`; older files carry position ids."""
    config = CLIPTextConfig.from_dict(
        {
            "vocab_size": 20,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "eos_token_id": 2,
        }
    )

    def build(rngs):
        return CLIPTextEncoder(config, with_projection=False, rngs=rngs)

    encoder = build(nnx.Rngs(0))
    save_module(encoder, {}, tmp_path, stem="model", dtype=np.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("text_model.") for name in tensors)
    save_file({name.removeprefix("text_model."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    assert_same(load(tmp_path, build=build), encoder)
    positions = {"text_model.embeddings.position_ids": np.arange(77, dtype=np.int64)[None]}
    save_file(tensors | positions, tmp_path / "model.safetensors")
    assert_same(load(tmp_path, build=build), encoder)
