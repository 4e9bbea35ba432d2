"""A pipeline of torch diffusers, written as a single file, generates the same image in diffusers and in this package."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny_pipeline
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from facts import warns
from oracle import psnr
from tiny_pipeline import TEXT_WIDTH, UNET, load_torch_pipeline, save_tiny_pipeline, save_tiny_sd_pipeline

from distrijax import DistriConfig, load_pipeline
from distrijax.convert.layouts.folder import from_folder
from distrijax.convert.layouts.original import to_original
from distrijax.convert.readers.safetensors_files import write_safetensors

CALL = {
    "prompt": "a red circle on the left",
    "negative_prompt": "a blue square",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
}
TORCH = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


class Case(NamedTuple):
    """A folder in the diffusers layout, and the same model as a single file."""

    family: str
    folder: Path
    file: Path


def save_sdxl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny SDXL whose text encoders are of different widths, by which alone diffusers tells them apart."""
    wide = 2 * TEXT_WIDTH
    sizes = {"cross_attention_dim": TEXT_WIDTH + wide, "projection_class_embeddings_input_dim": wide + 6 * 8}
    config = tiny_pipeline._text_config

    def text_config(tokenizer, *, hidden_act):
        made = config(tokenizer, hidden_act=hidden_act)
        if hidden_act == "gelu":
            made.hidden_size = made.projection_dim = wide
        return made

    monkeypatch.setattr(tiny_pipeline, "_text_config", text_config)
    monkeypatch.setattr(tiny_pipeline, "UNET", UNET | sizes)
    save_tiny_pipeline(folder)


@pytest.fixture(scope="module", params=TORCH)
def case(request, tmp_path_factory) -> Case:
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "sdxl":
            save_sdxl(root / "folder", monkeypatch)
        else:
            save_tiny_sd_pipeline(root / "folder", int(request.param[-1]))
    with warns("--config FOLDER", "unet: norm_num_groups 16"):
        tensors = to_original(from_folder(root / "folder"))
    write_safetensors(tensors, root / "model.safetensors")
    return Case(request.param, root / "folder", root / "model.safetensors")


def torch_picture(pipe: DiffusionPipeline, noise: torch.Tensor) -> np.ndarray:
    return pipe(**CALL, latents=noise.clone(), output_type="np").images


def test_diffusers_generates_the_same_from_the_single_file(case):
    noise = torch.randn(1, 4, 8, 8)
    wanted = torch_picture(load_torch_pipeline(case.folder), noise)
    pipe = TORCH[case.family].from_single_file(
        str(case.file), config=str(case.folder), local_files_only=True, dtype=torch.float32
    )
    pipe.watermark = None
    pipe.set_progress_bar_config(disable=True)
    assert psnr(torch_picture(pipe, noise), wanted) > 100  # the same to rounding, which depends on where tensors lie
    assert wanted.std() > 0.05


def test_this_package_generates_the_same_from_the_single_file(case):
    noise = torch.randn(1, 4, 8, 8)
    wanted = torch_picture(load_torch_pipeline(case.folder), noise)
    pipe = load_pipeline(case.file, DistriConfig(devices=1), config=case.folder)
    pipe.set_progress_bar_config(disable=True)
    got = pipe(**CALL, latents=noise.numpy(), output_type="np").images
    assert psnr(got, wanted) > 50
