"""Wrong input of every kind gets one sentence that helps, before anything is compiled, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import check_scenes
import jax
import numpy as np
import pytest
from facts import one_sentence, refuses, says
from safetensors.numpy import load_file, save_file

from distrijax import DistriConfig, DistriSDXLPipeline
from distrijax.cli import evaluate, generate

TEXT_ENCODER = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


# A damaged checkpoint --------------------------------------------------------------------------------------------------


def no(path: str) -> Callable[[Path], None]:
    """Removes a file or a folder."""

    def damage(folder: Path) -> None:
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def content(path: str, text: str) -> Callable[[Path], None]:
    """Puts other text into a file."""
    return lambda folder: (folder / path).write_text(text, encoding="utf-8") and None


def truncated(path: str) -> Callable[[Path], None]:
    """Cuts a file in half."""

    def damage(folder: Path) -> None:
        whole = (folder / path).read_bytes()
        (folder / path).write_bytes(whole[: len(whole) // 2])

    return damage


def entry(path: str, **entries) -> Callable[[Path], None]:
    """Changes or adds entries of a JSON file."""

    def damage(folder: Path) -> None:
        old = json.loads((folder / path).read_text(encoding="utf-8"))
        (folder / path).write_text(json.dumps({**old, **entries}), encoding="utf-8")

    return damage


def without(path: str, key: str) -> Callable[[Path], None]:
    """Removes an entry of a JSON file."""

    def damage(folder: Path) -> None:
        old = json.loads((folder / path).read_text(encoding="utf-8"))
        del old[key]
        (folder / path).write_text(json.dumps(old), encoding="utf-8")

    return damage


def tensors(change: Callable[[dict[str, np.ndarray], str], None], path: str = TEXT_ENCODER) -> Callable[[Path], None]:
    """Changes a safetensors file: `change(all tensors, name of one of them)`."""

    def damage(folder: Path) -> None:
        held = load_file(folder / path)
        change(held, min(held))
        save_file(held, folder / path, metadata={"format": "pt"})

    return damage


def set_tensor(value: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return tensors(lambda held, name: held.update({name: np.ascontiguousarray(value(held[name]))}))


def with_nan(tensor: np.ndarray) -> np.ndarray:
    tensor = tensor.copy()
    tensor.flat[-1] = np.nan
    return tensor


def shards(second: Callable[[Path, dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """Divides the weights in two shards; `second(file, its tensors)` writes the last one."""

    def damage(folder: Path) -> None:
        file = folder / TEXT_ENCODER
        held = load_file(file)
        file.unlink()
        names = sorted(held)
        parts = names[: len(names) // 2], names[len(names) // 2 :]
        files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        save_file({name: held[name] for name in parts[0]}, file.parent / files[0])
        second(file.parent / files[1], {names[0]: held[names[0]], **{name: held[name] for name in parts[1]}})
        index = {name: shard for part, shard in zip(parts, files, strict=True) for name in part}
        (file.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")

    return damage


CHECKPOINTS = {
    "no index": (no("model_index.json"), ["/model_index.json"]),
    "broken index": (content("model_index.json", '{"_class_name": '), ["model_index.json", "JSON"]),
    "index is a list": (content("model_index.json", "[]"), ["model_index.json", "list"]),
    "another pipeline": (
        entry("model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        ["_class_name", "StableDiffusionInpaintPipeline", "StableDiffusionXLPipeline"],
    ),
    "pipeline of the other family": (
        entry("model_index.json", _class_name="StableDiffusionPipeline"),
        ["Stable Diffusion", "Stable Diffusion XL", "DistriSDPipeline"],
    ),
    "no unet": (no("unet"), ["unet"]),
    "two parts missing": (lambda folder: (no("vae")(folder), no("tokenizer_2")(folder)), ["tokenizer_2", "vae"]),
    "no config": (no("vae/config.json"), ["/vae/config.json"]),
    "broken config": (content("unet/config.json", "{"), ["unet/config.json", "JSON"]),
    "config not text": (lambda f: (f / "vae/config.json").write_bytes(b"\xff\xfe\xfa"), ["vae/config.json"]),
    "unknown key": (
        entry("unet/config.json", block_out_chanels=[1]),
        ["block_out_chanels", "block_out_channels"],
    ),
    "unsupported value, unet": (entry("unet/config.json", act_fn="gelu"), ["act_fn", "gelu", "silu"]),
    "unknown block": (
        entry("unet/config.json", down_block_types=["CrossAttnDownBlock2D", "AttnDownBlock2D"]),
        ["AttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    ),
    "odd groups": (entry("unet/config.json", norm_num_groups=7), [32, 7, "groups"]),
    "lacking key": (without("unet/config.json", "cross_attention_dim"), ["cross_attention_dim"]),
    "unsupported value, vae": (entry("vae/config.json", latents_mean=[0.0]), ["latents_mean", "0.0", "None"]),
    "unsupported value, text encoder": (entry("text_encoder/config.json", hidden_act="relu"), ["hidden_act", "relu"]),
    "parts of two models": (entry("unet/config.json", cross_attention_dim=2048), [2048, 64]),
    "words without embedding": (entry("text_encoder/config.json", vocab_size=100), ["tokenizer", 100]),
    "unsupported scheduler": (
        entry("scheduler/scheduler_config.json", _class_name="HeunDiscreteScheduler"),
        ["HeunDiscreteScheduler", "EulerDiscreteScheduler"],
    ),
    "unsupported scheduler option": (
        entry("scheduler/scheduler_config.json", prediction_type="flow"),
        ["prediction_type", "flow", "epsilon", "v_prediction"],
    ),
    "no vocabulary": (no("tokenizer/vocab.json"), ["tokenizer", "vocab.json"]),
    "broken vocabulary": (content("tokenizer_2/vocab.json", "{"), ["tokenizer_2/vocab.json", "JSON"]),
    "no weights": (no(TEXT_ENCODER), ["text_encoder", "safetensors"]),
    "truncated weights": (truncated(TEXT_ENCODER), [TEXT_ENCODER]),
    "weights of noise": (content(TEXT_ENCODER, "no tensors here " * 99), [TEXT_ENCODER]),
    "empty weights": (content(TEXT_ENCODER, ""), [TEXT_ENCODER]),
    "missing tensor": (tensors(lambda held, name: held.pop(name)), ["1 missing", re.compile(r"text_model\..*weight")]),
    "unexpected tensor": (tensors(lambda held, name: held.update(lora=held[name].copy())), ["1 unexpected", "(lora)"]),
    "misshapen tensor": (set_tensor(lambda tensor: tensor[:-1]), [re.compile(r"1 .*shape.* \[\d+.* \[\d+")]),
    "NaN": (set_tensor(with_nan), ["1 not finite"]),
    "whole numbers": (
        set_tensor(lambda tensor: tensor.astype(np.int32)),
        [1, "float64", "float32", "float16", "bfloat16", "int32"],
    ),
    "layers of another model": (
        entry("text_encoder/config.json", num_hidden_layers=1),
        [re.compile(r"\d+ unexpected \(.* \d+ more\)")],
    ),
    "duplicate tensor": (shards(lambda file, held: save_file(held, file)), ["twice"]),
    "missing shard": (shards(lambda file, held: None), ["model-00002-of-00002.safetensors"]),
    "index without a map": (content("text_encoder/model.safetensors.index.json", "{}"), ["index.json", "weight_map"]),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused(kind, shallow_checkpoint, tmp_path):
    damage, told = CHECKPOINTS[kind]
    folder = shutil.copytree(shallow_checkpoint, tmp_path / "model")
    damage(folder)
    with refuses(*told) as error:
        DistriSDXLPipeline.from_pretrained(folder, DistriConfig(devices=1))
    one_sentence(str(error.value), longest=1500)  # tensors are listed


LOADING = {
    "bad folder": ({"pretrained_model_name_or_path": "/nowhere/at/all"}, ["/nowhere/at/all", "folder"]),
    "not on the hub": (
        {"pretrained_model_name_or_path": "no-such-owner/no-such-model"},
        ["no-such-owner/no-such-model"],
    ),
    "unknown variant": ({"variant": "fp8"}, ["variant", "fp8", "model.safetensors"]),
    "unknown scheduler": ({"scheduler": "heun"}, ["scheduler", "heun", "ddim"]),
    "unknown dtype": ({"dtype": "float8"}, ["dtype", "float8", "float32", "bfloat16", "float16"]),
    "unusable dtype": ({"dtype": np.int32}, ["dtype", "int32", "float32", "bfloat16", "float16"]),
    "dtype of another library": ({"dtype": object()}, ["dtype", "float32", "bfloat16", "float16"]),
    "a dict for a DistriConfig": (
        {"distri_config": {"devices": 8}},
        ["distri_config", "{'devices': 8}", "DistriConfig"],
    ),
    "first call misspelt": ({"compile_for": {"heigth": 64}}, ["compile_for", "heigth"]),
    "first call that is none": ({"compile_for": [64, 64]}, ["compile_for", "dict"]),
    "first call of text": ({"compile_for": "64"}, ["compile_for", "dict"]),
    "first call with latents of another size": (
        {"compile_for": {"height": 64, "width": 64, "latents": np.zeros((1, 2, 3))}},
        ["latents", "[1, 2, 3]", "[1, 4, 8, 8]"],
    ),
    "options in a list": ({"compiler_options": ["xla_x"]}, ["compiler_options", "['xla_x']", "dict"]),
    "first call with a wrong seed": ({"compile_for": {"seed": -1}}, ["seed", -1, 0]),
    "too many devices": ({"distri_config": DistriConfig(devices=9)}, ["devices", 9, 8, "cpu"]),
    "wrong product": (
        {"distri_config": DistriConfig(devices=8, cfg=2, patch=3)},
        ["data 1", "cfg 2", "patch 3", 6, "devices", 8],
    ),
}


@pytest.mark.parametrize("kind", LOADING)
def test_loading_with_wrong_arguments_is_refused(kind, shallow_checkpoint):
    arguments, told = LOADING[kind]
    with refuses(*told) as error:
        DistriSDXLPipeline.from_pretrained(**{"pretrained_model_name_or_path": shallow_checkpoint, **arguments})
    one_sentence(str(error.value))


CONFIGS = {
    "unknown sync_mode": ({"sync_mode": "no_sync_gn"}, "sync_mode no_sync_gn corrected_async_gn"),
    "unknown parallelism": ({"parallelism": "pipe"}, "parallelism pipe patch naive_patch tensor"),
    "unknown split_scheme": ({"split_scheme": "col"}, "split_scheme col row column alternate"),
    "negative warm-up": ({"warmup_steps": -1}, "warmup_steps -1 0"),
    "a fraction of a step": ({"sync_steps": (3, 0.5)}, "sync_steps 3 0.5"),
    "no steps": ({"sync_steps": "last"}, "sync_steps last 0 -1"),
    "predictions of nothing": ({"sync_mode": "no_sync", "extrapolate": True}, "extrapolate no_sync"),
    "unknown compression": ({"compress": "int2"}, "compress int2 int8 int4"),
    "compression by no name": ({"compress": True}, "compress True int8 int4"),
    "nothing to compress": ({"sync_mode": "full_sync", "compress": "int8"}, "compress full_sync"),
    "all is exact": ({"parallelism": "tensor", "sync_steps": (3,)}, "sync_steps tensor"),
    "fraction of a device": ({"devices": 2.5}, "devices 2.5"),
    "no devices": ({"devices": 0}, "devices 0 1"),
    "three branches": ({"cfg": 3}, "cfg 3 1 2"),
    "split that must not be": ({"cfg": 2, "split_batch": False}, "cfg=2 split_batch=False"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wrong_configuration_is_refused(kind):
    arguments, told = CONFIGS[kind]
    with refuses(*told.split()) as error:
        DistriConfig(**arguments)
    one_sentence(str(error.value))


# A wrong call ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(shallow_checkpoint) -> DistriSDXLPipeline:
    """Two images beside each other, each in two patches."""
    return DistriSDXLPipeline.from_pretrained(shallow_checkpoint, DistriConfig(devices=4, data=2, cfg=1))


def embeds(tokens: tuple = (2, 77, 64), pooled: tuple = (2, 32), prefix: str = "") -> dict[str, np.ndarray]:
    return {f"{prefix}prompt_embeds": np.zeros(tokens), f"{prefix}pooled_prompt_embeds": np.zeros(pooled)}


CALLS = {
    "odd height": ({"height": 100}, ["height", 100, 8, 96, 104]),
    "low height": ({"height": 7}, ["height", 7, 8]),
    "odd width": ({"width": 65}, ["width", 65, 8, 64, 72]),
    "zero height": ({"height": 0}, ["height", 0, 1]),
    "negative width": ({"width": -64}, ["width", -64, 1]),
    "height of text": ({"height": "64"}, ["height", "'64'", 1]),
    "no prompt": ({"prompt": None}, ["prompt", "string"]),
    "empty list": ({"prompt": []}, ["prompt", "list", "string"]),
    "prompt a number": ({"prompt": 7}, ["prompt", 7, "string", "list"]),
    "prompts of numbers": ({"prompt": ["a", 7]}, ["prompt", "['a', 7]", "string"]),
    "second prompts": ({"prompt_2": ["a"] * 3}, ["prompt", 2, 3]),
    "negative prompts": ({"negative_prompt": ["a"] * 3}, ["negative_prompt", 3, 2]),
    "negative prompt a number": ({"negative_prompt": 7}, ["negative_prompt", 7, "string"]),
    "prompt and embeddings": (embeds(), ["prompt", "prompt_embeds"]),
    "negative prompt and embeddings": (
        {"negative_prompt": "a", **embeds(prefix="negative_")},
        ["negative_prompt", "negative_prompt_embeds"],
    ),
    "embeddings alone": (
        {"prompt": None, "prompt_embeds": np.zeros((2, 77, 64))},
        ["prompt_embeds", "pooled_prompt_embeds"],
    ),
    "embeddings of wrong rank": (
        {"prompt": None, **embeds(tokens=(77, 64))},
        ["prompt_embeds", "[77, 64]", "[prompts, tokens, 64]"],
    ),
    "embeddings of wrong width": (
        {"prompt": None, **embeds(tokens=(2, 77, 63))},
        ["prompt_embeds", "[2, 77, 63]", "[prompts, tokens, 64]"],
    ),
    "pooled of wrong width": (
        {"prompt": None, **embeds(pooled=(2, 31))},
        ["pooled_prompt_embeds", "[2, 31]", "[prompts, 32]"],
    ),
    "embeddings of no prompt": (
        {"prompt": None, **embeds((0, 77, 64), (0, 32))},
        ["prompt_embeds", "[0, 77, 64]", "[prompts, tokens, 64]"],
    ),
    "embeddings of no token": (
        {"prompt": None, **embeds(tokens=(2, 0, 64))},
        ["prompt_embeds", "[2, 0, 64]", "[prompts, tokens, 64]"],
    ),
    "negative embeddings of wrong length": (
        {"prompt": None, **embeds(), **embeds(tokens=(2, 50, 64), prefix="negative_")},
        ["negative", "[2, 50, 64]", "[2, 77, 64]"],
    ),
    "latents": ({"latents": np.zeros((2, 4, 9, 8))}, ["latents", "[2, 4, 9, 8]", "[2, 4, 8, 8]"]),
    "latents of NaN": ({"latents": np.full((2, 4, 8, 8), np.nan)}, ["latents", "finite"]),
    "complex latents": ({"latents": np.zeros((2, 4, 8, 8), complex)}, ["latents", "array"]),
    "ragged latents": ({"latents": [[1], [2, 3]]}, ["latents", "[[1], [2, 3]]", "array"]),
    "embeddings of text": (
        {"prompt": None, **embeds(), "pooled_prompt_embeds": "a"},
        ["pooled_prompt_embeds", "'a'", "array"],
    ),
    "callback": ({"callback_on_step_end": 3}, ["callback_on_step_end", 3, "function"]),
    "latents of text": ({"latents": "noise"}, ["latents", "noise"]),
    "too few seeds": ({"seed": [1]}, ["seed", 1, 2]),
    "negative seed": ({"seed": -1}, ["seed", -1, 0]),
    "seed of truth": ({"seed": True}, ["seed", "True"]),
    "no seed": ({"seed": None}, ["seed", "None"]),
    "seed of text": ({"seed": ["a", "b"]}, ["seed", "'a'"]),
    "no steps": ({"num_inference_steps": 0}, ["num_inference_steps", 0, 1]),
    "too many steps": ({"num_inference_steps": 1001}, ["num_inference_steps", 1001, 1000]),
    "steps of text": ({"num_inference_steps": "20"}, ["num_inference_steps", "'20'"]),
    "guidance NaN": ({"guidance_scale": float("nan")}, ["guidance_scale", "nan", "finite"]),
    "guidance of text": ({"guidance_scale": "5"}, ["guidance_scale", "'5'"]),
    "guidance rescale": ({"guidance_rescale": -0.5}, ["guidance_rescale", -0.5, 0]),
    "output type": ({"output_type": "jpeg"}, ["output_type", "jpeg", "pil", "np", "latent"]),
    "chunk size": ({"chunk_size": 0}, ["chunk_size", 0, 1]),
    "original size": ({"original_size": (64,)}, ["original_size", "(64,)"]),
    "crop of text": ({"crops_coords_top_left": ("a", 0)}, ["crops_coords_top_left", "'a'"]),
    "target size": ({"target_size": 64}, ["target_size", 64]),
    "negative original size": ({"negative_original_size": 64}, ["negative_original_size", 64]),
    "negative crop": (
        {"negative_crops_coords_top_left": (0,), "negative_original_size": (64, 64), "negative_target_size": (64, 64)},
        ["negative_crops_coords_top_left", "(0,)"],
    ),
    "negative target size of text": (
        {"negative_target_size": ("a", 64), "negative_original_size": (64, 64)},
        ["negative_target_size", "'a'"],
    ),
    "clip skip": ({"clip_skip": 9}, ["clip_skip", 9, 0, 2]),
    "clip skip of text": ({"clip_skip": "1"}, ["clip_skip", "'1'", 0]),
    "images beside each other": ({"prompt": ["a"] * 3}, [3, "data=2", 2]),
    "no images": ({"num_images_per_prompt": 0}, ["num_images_per_prompt", 0, 1]),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_wrong_call_is_refused(kind, pipe):
    arguments, told = CALLS[kind]
    with refuses(*told) as error:
        pipe(**{"prompt": ["a", "b"], "height": 64, "width": 64, "num_inference_steps": 2, **arguments})
    one_sentence(str(error.value))
    assert pipe.programs.count == 0


def test_a_scheduler_that_is_none_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", "euler")
    with refuses("scheduler", "'euler'", "distrijax.schedulers") as error:
        pipe("a", height=64, width=64)
    one_sentence(str(error.value))


# A wrong command -------------------------------------------------------------------------------------------------------

COMMANDS = {
    "unknown flag": ("--colour red", ["--colour", "red"]),
    "unknown value": ("--sync-mode stale", ["--sync-mode", "stale", "no_sync"]),
    "unknown scheduler": ("--scheduler heun", ["--scheduler", "heun", "ddim"]),
    "steps of text": ("--num-inference-steps many", ["--num-inference-steps", "int", "many"]),
    "three sizes": ("--image-size 64 64 64", ["--image-size", "H W", 3]),
    "no images": ("--batch 0", ["--batch", 0, 1]),
    "wrong suffix": ("--output image.jpeg", ["--output", "image.jpeg", ".png"]),
    "missing folder": ("--output nowhere/image.png", ["--output", "nowhere/image.png", "No such file"]),
    "folder in the way": ("--output folder.png", ["--output", "folder.png", "folder"]),
    "file for a folder": ("--output file/image.png", ["file/image.png", "Not a directory"]),
    "too many devices": ("--devices 9", ["--devices", 9, 8, "virtual CPU", "--devices 8"]),
    "no devices": ("--devices 0", ["devices", 0, 1]),
    "negative warm-up": ("--warmup-steps -1", ["warmup_steps", -1, 0]),
    "no step": ("--sync-steps -1 --sync-mode full_sync", ["sync_steps", "full_sync"]),
    "option without a value": ("--compiler-option xla_gpu_x", ["--compiler-option", "xla_gpu_x", "NAME=VALUE"]),
    "option of no compiler": (
        "--compiler-option xla_magic=1 --devices 1 --image-size 64 --num-inference-steps 1",
        ["XLA", "xla_magic"],
    ),
    "bad folder": ("--model ./nowhere", ["./nowhere", "folder"]),
    "odd size": ("--image-size 100 --devices 4", ["height", 100, 8, 96, 104]),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_wrong_command_ends_in_one_line_and_writes_nothing(kind, shallow_checkpoint, tmp_path, monkeypatch, capsys):
    flags, told = COMMANDS[kind]
    jax.devices()  # from here on as many as they are, whatever --devices says
    monkeypatch.setattr(generate, "keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        generate.main(["--model", str(shallow_checkpoint), *flags.split()])
    if isinstance(end.value.code, str):  # Python prints it and exits with 1
        printed = end.value.code + "\n"
    else:
        printed = capsys.readouterr().err
        assert end.value.code == 2
    assert re.fullmatch(r"error: [^\n]*\n", printed), printed
    says(printed, *told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("script", [generate, evaluate, check_scenes])
def test_the_help_shows_no_more_sizes_than_are_taken(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "  --image-size H [W] " in capsys.readouterr().out


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_wrong_seed_is_refused_before_anything_is_loaded(seed, monkeypatch, capsys):
    monkeypatch.setattr(generate, "load_pipeline", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(SystemExit):
        generate.main(["--seed", str(seed)])
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\n", printed), printed
    says(printed, "--seed", seed, 0, "2**63 - 1")


def test_a_folder_without_permission_is_found_out_before_loading(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with refuses("image.png", "Permission denied"):
        generate.output_files(tmp_path / "image.png", 1)


def test_an_image_that_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    class StubImage:
        def save(self, file, **_):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with refuses("image.png", "No space left on device"):
        generate.write(StubImage(), tmp_path / "image.png", {"seed": 0})
    assert list(tmp_path.iterdir()) == []
