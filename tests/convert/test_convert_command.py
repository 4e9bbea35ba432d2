"""`python -m distrijax.convert`, and the scripts with models that have to be converted."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import latency
import numpy as np
import pytest
import torch
from facts import says
from flax_model import flax_folder
from oracle import psnr
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from tiny_pipeline import load_torch_pipeline

from distrijax.cli import evaluate, generate
from distrijax.convert.__main__ import main

PAIRS = [
    *itertools.product(("diffusers", "single", "flax"), ("diffusers", "single")),
    ("orbax", "diffusers"),
    ("single", "orbax"),
]


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The sentence that a call ends with."""
    with pytest.raises(SystemExit) as error:
        convert(*arguments)
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
    return str(error.value)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder of safetensors, by part and name."""
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{file.parent.name}.{name}": array for file in files for name, array in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and np.array_equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def model(shallow_checkpoint, tmp_path_factory) -> Path:
    """The checkpoint as this package writes it: transformers 5 leaves out the beginning of its text encoders' names."""
    folder = tmp_path_factory.mktemp("convert") / "model"
    convert(shallow_checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def single(model) -> Path:
    file = model.parent / "model.safetensors"
    convert(model, file)
    return file


@pytest.fixture(scope="module")
def formats(model, single) -> dict[str, Path]:
    """The same model in every format."""
    orbax = model.parent / "orbax"
    convert(model, orbax, "--format", "orbax")
    return {"diffusers": model, "single": single, "flax": flax_folder(model, model.parent / "flax"), "orbax": orbax}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_in_one_format_and_out_in_another_is_the_same_bytes(formats, model, source, target, tmp_path):
    def configured(kind: str) -> list[str]:
        return ["--config", str(model)] if kind == "single" else []

    through = tmp_path / ("through.safetensors" if target == "single" else "through")
    convert(formats[source], through, "--format", target, *configured(source))
    convert(through, tmp_path / "back", *configured(target))
    assert same(tmp_path / "back", model)


def test_diffusers_paints_the_same_from_shards(model, shallow_checkpoint, tmp_path):
    convert(model, tmp_path / "shards", "--max-shard-size", "500KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np", "latents": torch.ones(1, 4, 8, 8)}
    got, wanted = (
        load_torch_pipeline(folder)("a red circle", **call).images
        for folder in (tmp_path / "shards", shallow_checkpoint)
    )
    assert psnr(got, wanted) > 80


@pytest.mark.parametrize(("dtype", "kind"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_weights_are_written_in_the_precision_asked_for(model, tmp_path, dtype, kind):
    convert(model, tmp_path / dtype, "--dtype", dtype)
    file = "unet/diffusion_pytorch_model.safetensors"
    got, exact = load_torch(tmp_path / dtype / file), load_torch(model / file)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, exact[name].to(kind), rtol=0, atol=0)


def test_pickles_are_read(model, tmp_path):
    shutil.copytree(model, tmp_path / "pickled")
    for file in (tmp_path / "pickled").glob("*/*.safetensors"):
        stem = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(load_torch(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    convert(tmp_path / "pickled", tmp_path / "folder")
    assert same(tmp_path / "folder", model)


def test_classes_of_flax_are_named_as_pytorchs(model, tmp_path):
    flax_folder(model, tmp_path / "flax")
    index = tmp_path / "flax" / "model_index.json"
    index.write_text(index.read_text().replace('"CLIPText', '"FlaxCLIPText').replace('"UNet2D', '"FlaxUNet2D'))
    convert(tmp_path / "flax", tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / index.name).read_text()) == json.loads((model / index.name).read_text())


def test_what_exists_is_replaced_only_by_force(model, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    says(refused(model, tmp_path / "old"), str(tmp_path / "old"), "--force")
    assert [path.name for path in tmp_path.glob("**/*")] == ["old", "file"]
    convert(model, tmp_path / "old", "--force")
    assert same(tmp_path / "old", model)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_an_interrupted_run_leaves_what_was_there(model, tmp_path, monkeypatch, error, force):
    def fail(file: Path, *_, **__):
        file.write_bytes(b"half")
        raise error

    if force:
        (tmp_path / "new").mkdir()
    monkeypatch.setattr("distrijax.convert.layouts.folder.write_safetensors", lambda tensors, path: fail(path))
    with pytest.raises(RuntimeError if error is RuntimeError else SystemExit):
        convert(model, tmp_path / "new", *["--force"] * force)
    assert [path.name for path in tmp_path.glob("**/*")] == ["new"] * force


def test_a_terminated_run_leaves_nothing(model, tmp_path):
    script = (
        "import sys, time\n"
        "from distrijax.convert import __main__; from distrijax.convert.layouts import folder\n"
        "def write(tensors, path):\n"
        "    path.write_bytes(b'half')\n"
        "    open(sys.argv.pop(), 'w').close()\n"
        "    time.sleep(60)\n"
        "folder.write_safetensors = write\n"
        "__main__.main(sys.argv[1:3])\n"
    )
    started = tmp_path / "started"
    target = tmp_path / "target"
    target.mkdir()
    process = subprocess.Popen([sys.executable, "-c", script, str(model), str(target / "new"), str(started)])
    try:
        for _ in range(600):
            if started.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert list(target.iterdir()), "nothing was begun"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not list(target.iterdir())


def test_dry_run_prints_where_each_tensor_goes(single, model, tmp_path, capsys):
    convert(single, tmp_path / "new", "--config", model, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(load_file(single))
    assert "first_stage_model.encoder.conv_in.weight -> vae.encoder.conv_in.weight" in lines
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_a_file_is_and_what_is_odd(single, model, tmp_path, capsys):
    tensors = load_file(single)
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    tensors["first_stage_model.quant_conv.weight"] *= 0
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"modelspec.title": "Dream"})
    convert(tmp_path / "odd.safetensors", "--inspect")
    told = capsys.readouterr().out
    says(told, "Stable Diffusion XL", "float32", "modelspec.title: Dream")
    says(told, f"{sum(array.size for array in tensors.values()):,}")
    says(told, f"1 not finite ({name})", re.compile(r"\b1 .*zero.* \(first_stage_model\.quant_conv\.weight\)"))
    convert(model, "--inspect")
    told = capsys.readouterr().out.splitlines()
    says(told[0], "StableDiffusionXLPipeline")
    says(told[1], "EulerDiscreteScheduler", "epsilon")
    assert [line.split(":")[0] for line in told[2:]] == ["unet", "vae", "text_encoder", "text_encoder_2"]


@pytest.mark.parametrize(
    ("flags", "told"),
    {
        "nowhere.safetensors OUT": ["nowhere.safetensors", "folder"],
        "MODEL OUT --ema": ["folder", "ema"],
        "MODEL OUT --lora x.safetensors:much": ["--lora", "x.safetensors:much", "FILE:WEIGHT"],
        "nowhere.safetensors OUT --max-shard-size 5G": ["--max-shard-size", "5G", "KB", "MB"],
        "nowhere.safetensors OUT.safetensors --max-shard-size 5G": ["--max-shard-size", "5G", "KB", "MB"],
        "nowhere.safetensors OUT.safetensors --max-shard-size 5GB": [
            "--max-shard-size",
            "--format diffusers",
            "single",
        ],
        "no OUT --format orbax --max-shard-size 5GB": ["--max-shard-size", "--format diffusers", "orbax"],
        "MODEL . --force": ["DESTINATION", re.compile(r" \.[ ,;]")],
        "MODEL .. --force": ["DESTINATION", re.compile(r" \.\.[ ,;]")],
        "MODEL OUT.safetensors --format orbax": ["--format", "orbax", "folder"],
        "MODEL OUT --format single": ["--format", "single", "file", ".safetensors"],
        "MODEL OUT.ckpt": [".safetensors", "out.safetensors", "folder"],
        "MODEL OUT.bin --dry-run": [".safetensors", "out.safetensors", "folder"],
        "nowhere/y.ckpt OUT.ckpt --format orbax": [".safetensors", "out.safetensors", "folder"],
        "MODEL OUT --vae MODEL/unet": ["encoder.conv_in.weight"],
    }.items(),
)
def test_wrong_flags_are_refused_in_a_sentence(model, tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    given = [flag.replace("MODEL", str(model)).replace("OUT", str(tmp_path / "out")) for flag in flags.split()]
    says(refused(*given), *told)
    assert not list(tmp_path.iterdir())


STYLED = "unet.mid_block.attentions.0.proj_in"
"""A layer with 64 inputs and outputs."""


@pytest.fixture
def style(tmp_path) -> Path:
    """A LoRA that adds one to all weights of `STYLED`."""
    factors = {"lora_A": np.ones((1, 64), np.float32), "lora_B": np.ones((64, 1), np.float32)}
    save_file({f"{STYLED}.{role}.weight": array for role, array in factors.items()}, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.fixture(scope="module")
def half(model) -> Path:
    """The model in float16."""
    folder = model.parent / "half"
    convert(model, folder, "--dtype", "float16")
    return folder


@pytest.mark.parametrize("target", ["out", "out.safetensors", "out --format orbax"])
def test_a_lora_that_is_too_much_for_16_bits_is_named_and_nothing_is_written(model, half, style, tmp_path, target):
    held = {*tmp_path.iterdir()}
    name, *flags = target.split()
    told = refused(half, tmp_path / name, *flags, "--lora", f"{style}:1e9")
    says(told, str(style), "1e+09", "float16")
    told = refused(model, tmp_path / name, *flags, "--lora", f"{style}:1e9", "--dtype", "float16")
    says(told, f"{STYLED}.weight", "float16")
    assert {*tmp_path.iterdir()} == held


CALL = ["--devices", "1", "--image-size", "64", "--num-inference-steps", "1"]


def test_generate_takes_a_single_file_and_says_in_the_picture_what_was_merged(
    model, single, style, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(generate, "keep_compiled_programs", lambda: None)
    made = []
    load = generate.load_pipeline
    monkeypatch.setattr(
        generate, "load_pipeline", lambda *given, **named: made.append(load(*given, **named)) or made[-1]
    )
    image = tmp_path / "image.png"
    flags = ["--config", str(model), "--lora", f"{style}:0.5", "--output", str(image)]
    generate.main([*CALL, "--model", str(single), *flags])
    with Image.open(image) as written:
        says(written.text["loras"], "style.safetensors", 0.5)
        assert written.text["model"] == str(single)
    convert(model, tmp_path / "copy", "--lora", f"{style}:0.5")
    generate.main([*CALL, "--model", str(tmp_path / "copy"), "--output", str(image)])
    merged, copy = made
    assert all(map(np.array_equal, merged._unet.params, copy._unet.params))
    assert not (tmp_path / "cache").exists()


def test_the_other_scripts_take_a_single_file_as_well(model, single, monkeypatch):
    assert len(jax.devices()) == 8  # else the script would have as many as it asks for
    monkeypatch.setattr(latency, "keep_compiled_programs", lambda: None)
    timed = []
    monkeypatch.setattr(latency, "measure", lambda arguments, model, devices: timed.append(model) or {})
    flags = ["--model", str(single), "--config", str(model)]
    latency.main([*flags, "--devices", "1", "2"])
    job = evaluate.read_job(evaluate.parse(flags), evaluate.scene_prompts(1))
    assert {each.what for each in (*timed, job.model)} == {str(single)} == {job.name}
    assert job.additions == {"config": str(model)}
