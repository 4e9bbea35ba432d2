"""Checkpoints of every kind, with all that goes on top: what is loaded is what a converted copy gives, to the bit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from facts import refuses
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from tiny_pipeline import TEXT_WIDTH

from distrijax import CheckpointError, DistriConfig, DistriSDPipeline, InvalidArgument, load_pipeline
from distrijax.convert.__main__ import main as convert
from distrijax.convert.layouts.folder import from_folder, write_folder
from distrijax.convert.layouts.original import to_original
from distrijax.convert.readers.safetensors_files import write_safetensors
from distrijax.convert.sources import open_checkpoint
from distrijax.pipelines import build
from distrijax.pipelines.build import Pipeline
from distrijax.weights.recipe import Recipe

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WORD = "<thing>"


@pytest.fixture(scope="module", params=["xl", 1, 2])
def folder(request, tiny_checkpoint, tiny_sd_checkpoints, tmp_path_factory) -> Path:
    """A model in float16, as most are."""
    source = tiny_checkpoint if request.param == "xl" else tiny_sd_checkpoints[request.param]
    half = tmp_path_factory.mktemp("half") / "folder"
    convert([str(source), str(half), "--dtype", "float16"])
    return half


@pytest.fixture(scope="module")
def single(folder) -> Path:
    """The same model as a single file."""
    with pytest.warns():  # of configs that such a file can't hold
        write_safetensors(to_original(from_folder(folder)), folder.parent / "single.safetensors")
    return folder.parent / "single.safetensors"


@pytest.fixture(scope="module")
def additions(folder, single) -> dict[str, object]:
    """Two LoRAs, an embedding, and a VAE out of a single file, for `load_pipeline`."""
    random, made = np.random.default_rng(0), folder.parent
    width = from_folder(folder).tensors["unet"][LAYER.removeprefix("unet.") + ".weight"].shape[0]
    for name in ("a", "b"):
        factors = {"lora_A": random.standard_normal((2, width)), "lora_B": random.standard_normal((width, 2))}
        tensors = {f"{LAYER}.{role}.weight": factor.astype(np.float32) for role, factor in factors.items()}
        save_file(tensors, made / f"{name}.safetensors")
    vectors = random.standard_normal((2, TEXT_WIDTH)).astype(np.float32)
    both = (folder / "text_encoder_2").exists()
    save_file({"clip_l": vectors, "clip_g": vectors} if both else {WORD: vectors}, made / "word.safetensors")
    return {
        "loras": [made / "a.safetensors", (made / "b.safetensors", 0.3)],
        "embeddings": {made / "word.safetensors": WORD},
        "vae": single,
    }


def flags(additions: dict[str, object]) -> list[str]:
    """The same for a command."""
    (first, (second, weight)), ((file, word),) = additions["loras"], additions["embeddings"].items()
    loras = ["--lora", str(first), "--lora", f"{second}:{weight}"]
    return [*loras, "--embedding", f"{file}:{word}", "--vae", str(additions["vae"])]


def params(pipe: Pipeline) -> list[np.ndarray]:
    models = (pipe._unet, pipe._vae, *pipe._prompts.encoders)
    return [np.asarray(array) for model in models for array in model.params]


def assert_same(one: Pipeline, other: Pipeline) -> None:
    for got, wanted in zip(params(one), params(other), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))
    for got, wanted in zip(one._prompts.tokenizers, other._prompts.tokenizers, strict=True):
        np.testing.assert_array_equal(got([f"a {WORD} on a table"]), wanted([f"a {WORD} on a table"]))
    assert (one.unet_config, one.vae_config, one.scheduler) == (other.unet_config, other.vae_config, other.scheduler)


SETTINGS = {
    "one device": {"devices": 1},
    "sharded flat": {"devices": 4, "shard_weights": True},
    "by channels": {"devices": 4, "parallelism": "tensor"},
}


def test_a_single_file_and_what_is_on_top_load_as_a_converted_copy_does(folder, single, additions, tmp_path):
    convert([str(folder), str(tmp_path / "copy"), *flags(additions)])
    torch.save(load_torch(single), tmp_path / "single.ckpt")
    for settings in SETTINGS.values():
        config = DistriConfig(**settings)
        copy = load_pipeline(tmp_path / "copy", config)
        for source, given in (
            (folder, {}),
            (single, {"config": folder}),
            (tmp_path / "single.ckpt", {"config": folder}),
        ):
            assert_same(load_pipeline(source, config, **given, **additions), copy)
            if len(jax.tree.leaves(settings)) > 1:  # of the other sources, reading is the same on every mesh
                break


def test_what_is_opened_is_loaded_several_times(folder, single):
    config = DistriConfig(devices=1)
    checkpoint = open_checkpoint(folder)
    one, other = (load_pipeline(checkpoint, config, dtype="bfloat16") for _ in range(2))
    assert_same(one, other)
    assert_same(type(one).from_single_file(single, config, config=str(folder), dtype="bfloat16"), one)
    with refuses("vae", "variant", "open_checkpoint", error=InvalidArgument):
        load_pipeline(checkpoint, config, vae="x", variant="fp16")
    adapted = open_checkpoint(folder, vae=folder / "vae")
    assert adapted.recipe == Recipe(folder, vae=folder / "vae")
    assert_same(load_pipeline(adapted, config, dtype="bfloat16"), one)
    with refuses("weights", error=InvalidArgument):
        load_pipeline(open_checkpoint(folder, weights=False), config)


def test_wrong_additions_are_refused(tiny_sd_checkpoints, tmp_path):
    folder, config = tiny_sd_checkpoints[1], DistriConfig(devices=1)
    for given, told in (
        ({"loras": 3}, ["loras", 3]),
        ({"loras": [("a", 1, 2)]}, ["loras"]),
        ({"loras": {"a": "much"}}, ["a"]),
        ({"vae": 5}, ["vae", 5]),
        ({"ema": True}, ["folder", "ema"]),
    ):
        with refuses(*told):
            DistriSDPipeline.from_pretrained(folder, config, **given)
    for given, told in (
        ({"lora": "a"}, ["lora", "loras"]),
        ({"torch_dtype": "float32"}, ["torch_dtype", "dtype"]),
        ({"scheduler_option": {}}, ["scheduler_options"]),
        ({"config": config}, ["config", "distri_config"]),
        ({"compile_for": {1: 2}}, ["compile_for", "{1: 2}"]),
    ):
        for load in (load_pipeline, DistriSDPipeline.from_pretrained, DistriSDPipeline.from_single_file):
            with refuses(*told, error=InvalidArgument):
                load(folder, **given)
    for given, told in (({"lora": "a"}, "loras"), ({"ofline": True}, "offline")):
        with refuses(*given, told, error=InvalidArgument):
            open_checkpoint(folder, **given)
    with refuses("vae", "recipe", error=InvalidArgument):
        open_checkpoint(Recipe(folder), vae=folder / "vae")
    (tmp_path / "empty").mkdir()
    for name, index in (("vae", "config.json"), ("unet", "config.json")):
        with refuses(f"{tmp_path / 'empty'}/{index}", "folder", error=CheckpointError):
            load_pipeline(folder, config, **{name: tmp_path / "empty"})
    with refuses("prediction_type", "noise", error=InvalidArgument):
        load_pipeline(folder, config, scheduler_options={"prediction_type": "noise"})


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_numbers_that_are_not_finite_are_told_of_the_file_that_has_them(part, tiny_sd_checkpoints, tmp_path):
    folder, other = tiny_sd_checkpoints[1], tmp_path / "other"
    shutil.copytree(folder / part, other)
    (weights,) = other.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_out.bias" if part == "unet" else "decoder.conv_out.bias"][0] = np.nan
    save_file(tensors, weights)
    with refuses(str(other), "not finite", "conv_out.bias", error=CheckpointError) as caught:
        load_pipeline(folder, DistriConfig(devices=1), **{part: other})
    assert str(folder) not in str(caught.value) and "config.json" not in str(caught.value)


class Compared(Exception):
    """Instead of the rest of loading."""


def test_processes_compare_what_is_on_top_of_the_model(tiny_sd_checkpoints, tmp_path, monkeypatch):
    folder, here, there = tiny_sd_checkpoints[1], tmp_path / "here", tmp_path / "there"
    for made in (here, there):
        made.mkdir()
        for word in ("a", "b"):
            save_file({word: np.ones((1, TEXT_WIDTH), np.float32)}, made / f"{word}.safetensors")

    def compared(_, facts):
        found.update(facts())
        raise Compared

    def facts_of(**additions) -> dict[str, object]:
        found.clear()
        with pytest.raises(Compared):
            load_pipeline(folder, DistriConfig(devices=1), **additions)
        return dict(found)

    found: dict[str, object] = {}
    monkeypatch.setattr(build, "check_agreement", compared)
    alike = [facts_of(embeddings={made / "a.safetensors": "<a>"}, vae=f"{folder}/vae") for made in (here, there)]
    assert alike[0] == alike[1]
    for other, name in (
        ({"embeddings": {here / "b.safetensors": "<a>"}, "vae": f"{folder}/vae"}, "embeddings"),
        ({"embeddings": {here / "a.safetensors": "<b>"}, "vae": f"{folder}/vae"}, "embeddings"),
        ({"embeddings": {here / "a.safetensors": "<a>"}}, "vae"),
    ):
        differing = facts_of(**other)
        assert {each for each, value in alike[0].items() if differing[each] != value} == {name}


def test_a_lora_on_weights_of_8_bits_is_not_rounded_away(tiny_sd_checkpoints, tmp_path):
    kind, name = np.dtype(ml_dtypes.float8_e4m3fn), LAYER.removeprefix("unet.") + ".weight"
    model = from_folder(tiny_sd_checkpoints[1])
    short = {
        part: {each: tensor.then(lambda array: array.astype(kind), dtype=kind) for each, tensor in held.items()}
        for part, held in model.tensors.items()
    }
    write_folder(dataclasses.replace(model, tensors=short), tmp_path / "short")
    width = short["unet"][name].shape[0]
    factors = {"lora_A": np.full((1, width), 1e-2, np.float32), "lora_B": np.full((width, 1), 1e-2, np.float32)}
    save_file({f"{LAYER}.{role}.weight": factor for role, factor in factors.items()}, tmp_path / "lora.safetensors")
    checkpoint = open_checkpoint(Recipe(tmp_path / "short", loras=[tmp_path / "lora.safetensors"]))
    merged = checkpoint.tensors["unet"][name].read()
    wanted = short["unet"][name].read().astype(np.float32) + np.float32(1e-4)
    np.testing.assert_array_equal(merged, wanted.astype(np.float16))
    load_pipeline(checkpoint, DistriConfig(devices=1))
