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
from safetensors.numpy import load_file, save_file

from distrijax import DistriConfig, DistriError, DistriSDXLPipeline
from distrijax.cli import evaluate, generate

TEXT_ENCODER = "text_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def assert_one_sentence(message: str, pattern: str, *, longest: int = 400) -> None:
    assert re.search(pattern, message), message
    assert "\n" not in message and 20 < len(message) < longest, message
    assert "; " in message, f"{message!r} does not say what to do"
    assert not re.search(r"Traceback|<class|object at 0x", message), message


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
    "no index": (no("model_index.json"), r"model_index\.json does not exist"),
    "broken index": (content("model_index.json", '{"_class_name": '), r"model_index\.json is not readable JSON"),
    "index is a list": (content("model_index.json", "[]"), r"model_index\.json holds a list"),
    "another pipeline": (
        entry("model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        r"_class_name is 'StableDiffusionInpaintPipeline'; .*'StableDiffusionXLPipeline'",
    ),
    "pipeline of the other family": (
        entry("model_index.json", _class_name="StableDiffusionPipeline"),
        "holds a Stable Diffusion pipeline, not Stable Diffusion XL; load it with DistriSDPipeline",
    ),
    "no unet": (no("unet"), "lacks unet;"),
    "two parts missing": (lambda folder: (no("vae")(folder), no("tokenizer_2")(folder)), "lacks tokenizer_2, vae;"),
    "no config": (no("vae/config.json"), r"vae/config\.json does not exist"),
    "broken config": (content("unet/config.json", "{"), r"unet/config\.json is not readable JSON"),
    "config not text": (
        lambda f: (f / "vae/config.json").write_bytes(b"\xff\xfe\xfa"),
        r"vae/config\.json is not readable",
    ),
    "unknown key": (
        entry("unet/config.json", block_out_chanels=[1]),
        "block_out_chanels.*did you mean 'block_out_channels'",
    ),
    "unsupported value, unet": (entry("unet/config.json", act_fn="gelu"), "act_fn is 'gelu'; supported: 'silu'"),
    "unknown block": (
        entry("unet/config.json", down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"]),
        "block type is 'AttnDownBlock2D'; supported",
    ),
    "odd groups": (entry("unet/config.json", norm_num_groups=7), "32 channels do not divide into 7 groups"),
    "lacking key": (without("unet/config.json", "cross_attention_dim"), "lacks cross_attention_dim;"),
    "unsupported value, vae": (entry("vae/config.json", latents_mean=[0.0]), r"latents_mean is \(0\.0,\); supported"),
    "unsupported value, text encoder": (entry("text_encoder/config.json", hidden_act="relu"), "hidden_act is 'relu'"),
    "parts of two models": (entry("unet/config.json", cross_attention_dim=2048), "2048 and the text encoders.*64;"),
    "words without embedding": (entry("text_encoder/config.json", vocab_size=100), "words and its text encoder 100;"),
    "unsupported scheduler": (
        entry("scheduler/scheduler_config.json", _class_name="HeunDiscreteScheduler"),
        "scheduler class is 'HeunDiscreteScheduler'; supported",
    ),
    "unsupported scheduler option": (
        entry("scheduler/scheduler_config.json", prediction_type="flow"),
        "prediction_type is 'flow'; use one of",
    ),
    "no vocabulary": (no("tokenizer/vocab.json"), r"tokenizer lacks vocab\.json"),
    "broken vocabulary": (content("tokenizer_2/vocab.json", "{"), r"tokenizer_2/vocab\.json is not readable JSON"),
    "no weights": (no(TEXT_ENCODER), r"text_encoder has no safetensors \(found: no weights\)"),
    "truncated weights": (truncated(TEXT_ENCODER), r"text_encoder/model\.safetensors is not a whole safetensors file"),
    "weights of noise": (content(TEXT_ENCODER, "no tensors here " * 99), "is not a whole safetensors file"),
    "empty weights": (content(TEXT_ENCODER, ""), "is not a whole safetensors file"),
    "missing tensor": (tensors(lambda held, name: held.pop(name)), r": 1 missing \(text_model\..*weight"),
    "unexpected tensor": (
        tensors(lambda held, name: held.update(lora=held[name].copy())),
        r"does not hold the model.*: 1 unexpected \(lora\)",
    ),
    "misshapen tensor": (set_tensor(lambda tensor: tensor[:-1]), r"1 misshapen \(.* is \[\d+.*should be \[\d+"),
    "NaN": (set_tensor(with_nan), r"1 not finite \("),
    "whole numbers": (
        set_tensor(lambda tensor: tensor.astype(np.int32)),
        r"1 of a type other than F64, F32, F16, BF16 \(.* is I32\)",
    ),
    "layers of another model": (
        entry("text_encoder/config.json", num_hidden_layers=1),
        r"unexpected \(.* and \d+ more\)",
    ),
    "duplicate tensor": (shards(lambda file, held: save_file(held, file)), r"1 duplicate \("),
    "missing shard": (shards(lambda file, held: None), r"00002-of-00002\.safetensors is named by the index"),
    "index without a map": (
        content("text_encoder/model.safetensors.index.json", "{}"),
        r"index\.json has no weight_map",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused(kind, tiny_checkpoint, tmp_path):
    damage, pattern = CHECKPOINTS[kind]
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    damage(folder)
    with pytest.raises(DistriError) as error:
        DistriSDXLPipeline.from_pretrained(folder, DistriConfig(devices=1))
    assert_one_sentence(str(error.value).replace(str(tmp_path), ""), pattern, longest=1500)  # tensors are listed


LOADING = {
    "bad folder": (
        {"pretrained_model_name_or_path": "/nowhere/at/all"},
        "/nowhere/at/all is neither a file nor a folder; give",
    ),
    "not on the hub": ({"pretrained_model_name_or_path": "no-such-owner/no-such-model"}, "no-such-owner/no-such-model"),
    "unknown variant": ({"variant": "fp8"}, "no safetensors of variant 'fp8' .found: .*, model.safetensors.; choose"),
    "unknown scheduler": ({"scheduler": "heun"}, "scheduler is 'heun'; use one of: ddim"),
    "unknown dtype": ({"dtype": "float8"}, "dtype is 'float8'; use one of: float32, bfloat16, float16"),
    "unusable dtype": ({"dtype": np.int32}, "dtype is 'int32'; use one of"),
    "dtype of another library": ({"dtype": object()}, "dtype is .*; use one of"),
    "a dict for a DistriConfig": (
        {"distri_config": {"devices": 8}},
        r"distri_config is \{'devices': 8\}; give a DistriConfig, such as",
    ),
    "first call misspelt": (
        {"compile_for": {"heigth": 64}},
        "compile_for: got an unexpected keyword argument 'heigth'; give a dict of arguments of the pipeline's call",
    ),
    "first call that is none": ({"compile_for": [64, 64]}, "compile_for: .*; give a dict of arguments"),
    "first call of text": ({"compile_for": "64"}, "compile_for: .*; give a dict of arguments"),
    "first call with latents of another size": (
        {"compile_for": {"height": 64, "width": 64, "latents": np.zeros((1, 2, 3))}},
        r"latents is \[1, 2, 3\]; give .*, here \[1, 4, 8, 8\]",
    ),
    "options in a list": ({"compiler_options": ["xla_x"]}, r"compiler_options is \['xla_x'\]; give a dict"),
    "first call with a wrong seed": ({"compile_for": {"seed": -1}}, "seed is -1; give a whole number"),
    "too many devices": ({"distri_config": DistriConfig(devices=9)}, r"devices is 9 and JAX shows 8 \(cpu\); ask for"),
    "wrong product": (
        {"distri_config": DistriConfig(devices=8, cfg=2, patch=3)},
        "data 1 x cfg 2 x patch 3 is 6 and devices is 8; choose",
    ),
}


@pytest.mark.parametrize("kind", LOADING)
def test_loading_with_wrong_arguments_is_refused(kind, tiny_checkpoint):
    arguments, pattern = LOADING[kind]
    with pytest.raises(DistriError) as error:
        DistriSDXLPipeline.from_pretrained(**{"pretrained_model_name_or_path": tiny_checkpoint, **arguments})
    assert_one_sentence(str(error.value).replace(str(tiny_checkpoint), ""), pattern)


CONFIGS = {
    "unknown sync_mode": ({"sync_mode": "no_sync_gn"}, "sync_mode is 'no_sync_gn'; use one of: corrected_async_gn"),
    "unknown parallelism": ({"parallelism": "pipe"}, "parallelism is 'pipe'; use one of: patch, naive_patch, tensor"),
    "unknown split_scheme": ({"split_scheme": "col"}, "split_scheme is 'col'; use one of: row, column, alternate"),
    "negative warm-up": ({"warmup_steps": -1}, "warmup_steps is -1; give a whole number of at least 0"),
    "a fraction of a step": ({"sync_steps": (3, 0.5)}, r"sync_steps is \(3, 0.5\); give whole numbers"),
    "no steps": ({"sync_steps": "last"}, "sync_steps is 'last'; give whole numbers, from 0 on or from -1 back"),
    "predictions of nothing": (
        {"sync_mode": "no_sync", "extrapolate": True},
        "extrapolate is set and changes nothing in no_sync",
    ),
    "unknown compression": ({"compress": "int2"}, "compress is 'int2'; use one of: int8, int4"),
    "compression by no name": ({"compress": True}, "compress is True; use one of: int8, int4"),
    "nothing to compress": (
        {"sync_mode": "full_sync", "compress": "int8"},
        "compress is set and changes nothing in full_sync",
    ),
    "all is exact": (
        {"parallelism": "tensor", "sync_steps": (3,)},
        "sync_steps is set and changes nothing in tensor; leave",
    ),
    "fraction of a device": ({"devices": 2.5}, "devices is 2.5; give a whole number"),
    "no devices": ({"devices": 0}, "devices is 0; give a whole number of at least 1"),
    "three branches": ({"cfg": 3}, "cfg is 3; .*use 1 or 2"),
    "split that must not be": ({"cfg": 2, "split_batch": False}, "cfg=2 splits .* split_batch=False forbids it; drop"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wrong_configuration_is_refused(kind):
    arguments, pattern = CONFIGS[kind]
    with pytest.raises(DistriError) as error:
        DistriConfig(**arguments)
    assert_one_sentence(str(error.value), pattern)


# A wrong call ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint) -> DistriSDXLPipeline:
    """Two images beside each other, each in two patches."""
    return DistriSDXLPipeline.from_pretrained(tiny_checkpoint, DistriConfig(devices=4, data=2, cfg=1))


def embeds(tokens: tuple = (2, 77, 64), pooled: tuple = (2, 32), prefix: str = "") -> dict[str, np.ndarray]:
    return {f"{prefix}prompt_embeds": np.zeros(tokens), f"{prefix}pooled_prompt_embeds": np.zeros(pooled)}


CALLS = {
    "odd height": ({"height": 100}, "height is 100 and this model needs a multiple of 8; use 96 or 104"),
    "low height": ({"height": 7}, "height is 7 and this model needs a multiple of 8; use 8"),
    "odd width": ({"width": 65}, "width is 65 and this model needs a multiple of 8; use 64 or 72"),
    "zero height": ({"height": 0}, "height is 0; give a whole number of at least 1"),
    "negative width": ({"width": -64}, "width is -64; give a whole number"),
    "height of text": ({"height": "64"}, "height is '64'; give a whole number"),
    "no prompt": ({"prompt": None}, "prompt is missing; give a string"),
    "empty list": ({"prompt": []}, "prompt is an empty list; give at least one string"),
    "prompt a number": ({"prompt": 7}, "prompt is 7; give a string or a list of strings"),
    "prompts of numbers": ({"prompt": ["a", 7]}, r"prompt is \['a', 7\]; give a string"),
    "second prompts": ({"prompt_2": ["a"] * 3}, "prompt has 2 entries for 3 prompts; give one, or"),
    "negative prompts": ({"negative_prompt": ["a"] * 3}, "negative_prompt has 3 entries for 2 prompts; give one, or"),
    "negative prompt a number": ({"negative_prompt": 7}, "negative_prompt is 7; give a string"),
    "prompt and embeddings": (embeds(), "both prompt and prompt_embeds are given; give one"),
    "negative prompt and embeddings": (
        {"negative_prompt": "a", **embeds(prefix="negative_")},
        "both negative_prompt and negative_prompt_embeds are given; give one",
    ),
    "embeddings alone": (
        {"prompt": None, "prompt_embeds": np.zeros((2, 77, 64))},
        "only one of prompt_embeds and pooled_prompt_embeds is given; give both",
    ),
    "embeddings of wrong rank": (
        {"prompt": None, **embeds(tokens=(77, 64))},
        r"prompt_embeds is \[77, 64\] .*; give \[prompts, tokens, 64\]",
    ),
    "embeddings of wrong width": (
        {"prompt": None, **embeds(tokens=(2, 77, 63))},
        r"prompt_embeds is \[2, 77, 63\] .*; give \[prompts, tokens, 64\]",
    ),
    "pooled of wrong width": (
        {"prompt": None, **embeds(pooled=(2, 31))},
        r"pooled_prompt_embeds is \[2, 31\]; give .* and \[prompts, 32\]",
    ),
    "embeddings of no prompt": (
        {"prompt": None, **embeds((0, 77, 64), (0, 32))},
        r"prompt_embeds is \[0, 77, 64\] .*; give \[prompts, tokens, 64\]",
    ),
    "embeddings of no token": (
        {"prompt": None, **embeds(tokens=(2, 0, 64))},
        r"prompt_embeds is \[2, 0, 64\] .*; give \[prompts, tokens, 64\]",
    ),
    "negative embeddings of wrong length": (
        {"prompt": None, **embeds(), **embeds(tokens=(2, 50, 64), prefix="negative_")},
        r"negative embeddings are \[2, 50, 64\] and the prompt's are \[2, 77, 64\]; give",
    ),
    "latents": ({"latents": np.zeros((2, 4, 9, 8))}, r"latents is \[2, 4, 9, 8\]; give .*, here \[2, 4, 8, 8\]"),
    "latents of NaN": ({"latents": np.full((2, 4, 8, 8), np.nan)}, "latents has values that are not finite; give"),
    "complex latents": ({"latents": np.zeros((2, 4, 8, 8), complex)}, "latents is .*; give an array of numbers"),
    "ragged latents": ({"latents": [[1], [2, 3]]}, r"latents is \[\[1\], \[2, 3\]\]; give an array of numbers"),
    "embeddings of text": (
        {"prompt": None, **embeds(), "pooled_prompt_embeds": "a"},
        "^pooled_prompt_embeds is 'a'; give an array of numbers",
    ),
    "callback": ({"callback_on_step_end": 3}, "callback_on_step_end is 3; give a function"),
    "latents of text": ({"latents": "noise"}, "latents is 'noise'; give"),
    "too few seeds": ({"seed": [1]}, "seed has 1 entries for 2 images; give one, or one for each"),
    "negative seed": ({"seed": -1}, "seed is -1; give a whole number from 0"),
    "seed of truth": ({"seed": True}, "seed is True; give a whole number"),
    "no seed": ({"seed": None}, "seed is None; give a whole number"),
    "seed of text": ({"seed": ["a", "b"]}, "seed is 'a'; give a whole number"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps is 0; give a whole number"),
    "too many steps": (
        {"num_inference_steps": 1001},
        "num_inference_steps is 1001 and the model knows 1000 .* at most 1000",
    ),
    "steps of text": ({"num_inference_steps": "20"}, "num_inference_steps is '20'; give a whole number"),
    "guidance NaN": ({"guidance_scale": float("nan")}, "guidance_scale is nan; give a finite number"),
    "guidance of text": ({"guidance_scale": "5"}, "guidance_scale is '5'; give a finite number"),
    "guidance rescale": ({"guidance_rescale": -0.5}, "guidance_rescale is -0.5; give a finite number of at least 0"),
    "output type": ({"output_type": "jpeg"}, "output_type is 'jpeg'; supported: 'pil', 'np', 'latent'"),
    "chunk size": ({"chunk_size": 0}, "chunk_size is 0; give a whole number of at least 1"),
    "original size": ({"original_size": (64,)}, r"original_size is \(64,\); give two numbers"),
    "crop of text": ({"crops_coords_top_left": ("a", 0)}, "crops_coords_top_left is 'a'; give a finite number"),
    "target size": ({"target_size": 64}, "target_size is 64; give two numbers"),
    "negative original size": ({"negative_original_size": 64}, "^negative_original_size is 64; give two numbers"),
    "negative crop": (
        {"negative_crops_coords_top_left": (0,), "negative_original_size": (64, 64), "negative_target_size": (64, 64)},
        r"^negative_crops_coords_top_left is \(0,\); give two numbers",
    ),
    "negative target size of text": (
        {"negative_target_size": ("a", 64), "negative_original_size": (64, 64)},
        "^negative_target_size is 'a'; give a finite number",
    ),
    "clip skip": ({"clip_skip": 9}, "clip_skip is 9; .* takes 0 to 2"),
    "clip skip of text": ({"clip_skip": "1"}, "clip_skip is '1'; give a whole number of at least 0"),
    "images beside each other": ({"prompt": ["a"] * 3}, "3 images do not divide among data=2; make a multiple of 2"),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; give a whole number of at least 1"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_wrong_call_is_refused(kind, pipe):
    arguments, pattern = CALLS[kind]
    with pytest.raises(DistriError) as error:
        pipe(**{"prompt": ["a", "b"], "height": 64, "width": 64, "num_inference_steps": 2, **arguments})
    assert_one_sentence(str(error.value), pattern)
    assert pipe.programs.count == 0


def test_a_scheduler_that_is_none_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", "euler")
    with pytest.raises(DistriError) as error:
        pipe("a", height=64, width=64)
    assert_one_sentence(str(error.value), "^the pipeline's scheduler is 'euler'; give one of distrijax.schedulers")


# A wrong command -------------------------------------------------------------------------------------------------------

COMMANDS = {
    "unknown flag": ("--colour red", "unrecognized arguments: --colour red"),
    "unknown value": ("--sync-mode stale", "--sync-mode: invalid choice: 'stale'"),
    "unknown scheduler": ("--scheduler heun", "--scheduler: invalid choice: 'heun'"),
    "steps of text": ("--num-inference-steps many", "--num-inference-steps: invalid int value: 'many'"),
    "three sizes": ("--image-size 64 64 64", "--image-size takes H or H W, not 3 numbers"),
    "no pictures": ("--batch 0", "--batch is 0; give at least 1"),
    "wrong suffix": ("--output picture.jpeg", r"--output is picture\.jpeg; give a name that ends in \.png"),
    "missing folder": (
        "--output nowhere/picture.png",
        r"--output nowhere/picture\.png cannot be written \(No such file",
    ),
    "folder in the way": ("--output folder.png", r"--output folder\.png is a folder; give the name of a file"),
    "file for a folder": ("--output file/picture.png", r"cannot be written \(Not a directory\); choose another folder"),
    "too many devices": (
        "--devices 9",
        r"--devices is 9 and this machine shows 8 \(virtual CPU\); use --devices 8 or fewer",
    ),
    "no devices": ("--devices 0", "devices is 0; give a whole number of at least 1"),
    "negative warm-up": ("--warmup-steps -1", "warmup_steps is -1; give a whole number of at least 0"),
    "no step": (
        "--sync-steps -1 --sync-mode full_sync",
        "sync_steps is set and changes nothing in full_sync; leave it out",
    ),
    "option without a value": ("--compiler-option xla_gpu_x", "--compiler-option is xla_gpu_x; give NAME=VALUE"),
    "option of no compiler": (
        "--compiler-option xla_magic=1",
        "XLA refuses a compiler option .*'xla_magic'.*; leave it out",
    ),
    "bad folder": ("--model ./nowhere", r"\./nowhere is neither a file nor a folder; give one"),
    "odd size": ("--image-size 100 --devices 4", "height is 100 and this model needs a multiple of 8; use 96 or 104"),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_wrong_command_ends_in_one_line_and_writes_nothing(kind, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    flags, pattern = COMMANDS[kind]
    jax.devices()  # from here on as many as they are, whatever --devices says
    monkeypatch.setattr(generate, "keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        generate.main(["--model", str(tiny_checkpoint), *flags.split()])
    if isinstance(end.value.code, str):  # Python prints it and exits with 1
        printed = end.value.code + "\n"
    else:
        printed = capsys.readouterr().err
        assert end.value.code == 2
    assert re.fullmatch(rf"error: [^\n]*{pattern}[^\n]*\n", printed), printed
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
    assert capsys.readouterr().err == f"error: --seed is {seed}; give a whole number from 0 to 2**63 - 1\n"


def test_a_folder_without_permission_is_found_out_before_loading(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(DistriError, match=r"cannot be written \(Permission denied\); choose another folder"):
        generate.output_files(tmp_path / "picture.png", 1)


def test_a_picture_that_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    class Picture:
        def save(self, file, **_):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(DistriError, match=r"could not be written \(No space left on device\); make room"):
        generate.write(Picture(), tmp_path / "picture.png", {"seed": 0})
    assert list(tmp_path.iterdir()) == []
