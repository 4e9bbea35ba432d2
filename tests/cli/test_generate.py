"""The command that makes an image, run as users run it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from facts import refuses, says
from PIL import Image

import distrijax.cli.generate as generate_script
from distrijax import DistriConfig, DistriSDXLPipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "generate.py"
PROMPT = "a small green star in the center, on a black background — ★"
NEGATIVE = "a red circle"


@pytest.fixture(scope="module")
def run(shallow_checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """A folder with one image in it, and what the script printed; two patches for each branch, two of three steps exact."""
    folder = tmp_path_factory.mktemp("generate")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    flags = ["--model", str(shallow_checkpoint), "--prompt", PROMPT, "--negative-prompt", NEGATIVE]
    flags += ["--devices", "4", "--image-size", "64", "--num-inference-steps", "3", "--warmup-steps", "1"]
    flags += ["--guidance-scale", "4", "--seed", "7", "--output", "star.png"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return folder, done.stdout


def test_the_plan_and_the_times_are_printed(run):
    _, printed = run
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert list(lines) == ["mesh", "image", "load", "compile", "run", "wrote"]
    says(lines["mesh"], "data 1", "cfg 2", "patch 2", 4, "virtual CPU", "float32")
    says(lines["image"], "64x64", "32 rows", 4)
    says(lines["wrote"], "star.png")


def test_the_image_carries_its_settings(run):
    folder, _ = run
    assert [path.name for path in folder.iterdir()] == ["star.png"]
    text = Image.open(folder / "star.png").text
    assert text["prompt"] == PROMPT
    expected = {
        "negative_prompt": NEGATIVE,
        "seed": "7",
        "height": "64",
        "width": "64",
        "num_inference_steps": "3",
        "guidance_scale": "4.0",
        "scheduler": "EulerDiscreteScheduler",
        "dtype": "float32",
        "devices": "4",
        "sync_mode": "corrected_async_gn",
        "warmup_steps": "1",
        "parallelism": "patch",
    }
    assert {name: text[name] for name in expected} == expected


def test_the_image_is_the_pipelines(run, shallow_checkpoint):
    pipe = DistriSDXLPipeline.from_pretrained(shallow_checkpoint, DistriConfig(devices=4, warmup_steps=1))
    pipe.set_progress_bar_config(disable=True)
    needed = pipe(
        PROMPT, negative_prompt=NEGATIVE, height=64, width=64, num_inference_steps=3, guidance_scale=4.0, seed=7
    ).images[0]
    written = Image.open(run[0] / "star.png")
    assert written.size == (64, 64) and written.mode == "RGB"
    difference = np.asarray(written, np.int16) - np.asarray(needed, np.int16)
    assert np.abs(difference).max() <= 1


def test_another_run_overwrites_the_image(run, shallow_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate_script, "keep_compiled_programs", lambda: None)
    monkeypatch.chdir(tmp_path)
    before = Path(shutil.copy(run[0] / "star.png", tmp_path)).read_bytes()
    flags = ["--devices", "1", "--image-size", "64", "--num-inference-steps", "1", "--output", "star.png"]
    generate_script.main(["--model", str(shallow_checkpoint), *flags])
    says(capsys.readouterr().out, re.compile(r"run .* s .*\b1 step\b"))
    assert Image.open("star.png").text["num_inference_steps"] == "1"
    assert Path("star.png").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["star.png"]


def test_the_plan_alone_needs_no_devices_and_writes_nothing(shallow_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--plan", "--devices", "64", "--image-size", "2048", "512", "--dtype", "bfloat16", "--output", "x.png"]
    generate_script.main(["--model", str(shallow_checkpoint), *flags])
    mesh, image, stale, received = capsys.readouterr().out.splitlines()
    says(mesh, "data 1", "cfg 2", "patch 32", "bfloat16")
    says(image, "2048x512", "64 rows", 8)
    says(stale, "kv")
    says(received, "guidance")
    assert not list(tmp_path.iterdir())


def test_the_plan_needs_no_weights(shallow_checkpoint, tmp_path, capsys):
    configurations = shutil.copytree(
        shallow_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")
    )
    generate_script.main(["--model", str(configurations), "--plan", "--devices", "2", "--image-size", "64"])
    says(capsys.readouterr().out, "data 1", "cfg 2", "patch 1", "guidance")


def test_the_plan_of_stable_diffusion_1_has_its_size(tiny_sd_checkpoints, capsys):
    generate_script.main(["--model", str(tiny_sd_checkpoints[1]), "--plan", "--devices", "4", "--scheduler", "pndm"])
    mesh, image, _, received = capsys.readouterr().out.splitlines()
    says(mesh, "data 1", "cfg 2", "patch 2", "float32")
    says(image, "128x128", "64 rows", 8)
    says(received, "kv")


@pytest.mark.parametrize(
    ("flags", "compress"), [([], None), (["--compress"], "int8"), (["--compress", "int4"], "int4")]
)
def test_compression_without_a_name_is_int8(flags, compress):
    assert generate_script.parse([*flags, "--plan"]).compress == compress


def test_a_plan_that_cannot_be_is_refused_before_anything_is_loaded(shallow_checkpoint):
    with refuses("height", 65, 8, 64, 72, error=SystemExit):
        generate_script.main(["--model", str(shallow_checkpoint), "--plan", "--devices", "16", "--image-size", "65"])


@pytest.mark.parametrize(
    ("flags", "mesh", "image"),
    [
        ("--devices 2 --guidance-scale 1", "data 1, cfg 1, patch 2", "128x128, 64 rows, 8"),
        ("--devices 2 --guidance-scale 1 --parallelism tensor", "data 1, cfg 2, patch 1", "128x128, 128 rows, 16"),
        ("--devices 4 --parallelism naive_patch --split-scheme row", "data 1, cfg 2, patch 2", "128x128, 64 rows, 8"),
        (
            "--devices 4 --parallelism naive_patch --split-scheme column --image-size 128 256",
            "data 1, cfg 2, patch 2",
            "128x256, 128 columns, 16",
        ),
        (
            "--devices 4 --parallelism naive_patch --image-size 128 256",
            "data 1, cfg 2, patch 2",
            "128x256, 64 rows, 8, 128 columns, 16",
        ),
        ("--devices 9 --image-size 64", "data 1, cfg 1, patch 9", "64x64, 16 rows, 2, 80, 144"),
        (
            "--devices 9 --parallelism naive_patch --split-scheme column --image-size 64 288 --batch 2",
            "data 1, cfg 1, patch 9",
            "64x288, 2, 32 columns, 4, 80, 144",
        ),
    ],
)
def test_what_each_device_has_is_told_as_it_is(flags, mesh, image, shallow_checkpoint, capsys):
    """The size, then how many rows or columns of pixels and of the latent, then how many are padding, of how many."""
    generate_script.main(["--model", str(shallow_checkpoint), "--plan", *flags.split()])
    told_mesh, told_image = capsys.readouterr().out.splitlines()[:2]
    says(told_mesh, *mesh.split(", "), "float32")
    says(told_image, *image.split(", "))
    assert re.findall(r"\d+", told_image) == re.findall(r"\d+", image)  # and no other number
