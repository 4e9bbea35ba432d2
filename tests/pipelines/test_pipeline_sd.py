"""Stable Diffusion 1.x and 2.x against torch diffusers on one device, many devices against one, and what is refused."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest
import torch
from calls import LATENT, OTHER, PROMPT, SIZE, generated, trajectory
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from facts import one_sentence, refuses
from marks import slow, slow_but
from oracle import psnr, relative_error
from safetensors.numpy import load_file, save_file
from test_wrong_input import entry
from tiny_pipeline import load_torch_pipeline
from transformers import CLIPTextModel

from distrijax import DistriConfig, DistriSDPipeline, DistriSDXLPipeline, load_pipeline
from distrijax.schedulers import with_class


@pytest.fixture(scope="module")
def pipe_on(tiny_sd_checkpoints):
    """A pipeline by version and configuration: pipe_on(1, devices=4, split_batch=False)."""

    @functools.lru_cache(2)
    def load(version: int, **settings) -> DistriSDPipeline:
        pipe = DistriSDPipeline.from_pretrained(tiny_sd_checkpoints[version], DistriConfig(**settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def one(pipe_on):
    """One device, by version: one(1)."""
    return lambda version: pipe_on(version, devices=1, sync_mode="full_sync")


@pytest.fixture(scope="module")
def torch_pipes(tiny_sd_checkpoints):
    """The checkpoints in torch diffusers, by version."""
    return functools.cache(lambda version: load_torch_pipeline(tiny_sd_checkpoints[version]))


ORACLES = {
    "1.x": (1, None, {"negative_prompt": "a blue square", "num_inference_steps": 6}),
    "1.x without guidance": (1, None, {"guidance_scale": 1.0, "clip_skip": 2, "num_inference_steps": 1}),
    "1.x euler": (1, ("euler", EulerDiscreteScheduler), {"guidance_rescale": 0.7, "clip_skip": 1}),
    "1.x dpm++2m": (1, ("dpm++2m", DPMSolverMultistepScheduler), {"guidance_scale": 3.0, "clip_skip": 0}),
    "2.x": (2, None, {}),
    "2.x pndm": (2, ("pndm", functools.partial(PNDMScheduler.from_config, skip_prk_steps=True)), {"clip_skip": 1}),
}


@pytest.mark.parametrize("case", slow_but(["1.x"], ORACLES))
def test_one_device_equals_torch_diffusers(monkeypatch, one, torch_pipes, case):
    version, scheduler, settings = ORACLES[case]
    # with clip_skip diffusers still looks for the final norm where transformers had it before version 5
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda encoder: encoder), raising=False)
    ours, theirs = one(version), torch_pipes(version)
    if scheduler:
        name, kind = scheduler
        monkeypatch.setattr(theirs, "scheduler", getattr(kind, "from_config", kind)(theirs.scheduler.config))
        monkeypatch.setattr(ours, "scheduler", with_class(ours.scheduler, name))
    noise = torch.randn(1, *LATENT)

    def wanted(output_type):
        defaults = SIZE | {"num_inference_steps": 4, "latents": noise.clone()}
        return theirs(PROMPT, **defaults | settings, output_type=output_type).images

    assert relative_error(generated(ours, latents=noise.numpy(), **settings), wanted("latent")) < 1e-3
    assert psnr(generated(ours, kind="np", latents=noise.numpy(), **settings), wanted("np")) > 50


def test_the_missing_negative_prompt_is_the_empty_one(one):
    np.testing.assert_array_equal(generated(one(1)), generated(one(1), negative_prompt=""))
    assert relative_error(generated(one(1)), generated(one(1), negative_prompt=OTHER)) > 1e-3


def test_embeddings_of_torch_diffusers_take_the_place_of_prompts(one, torch_pipes):
    with torch.no_grad():
        names = ("prompt_embeds", "negative_prompt_embeds")
        given = dict(zip(names, torch_pipes(1).encode_prompt(PROMPT, "cpu", 1, True, OTHER), strict=True))
    given = {name: value.numpy() for name, value in given.items()}
    assert relative_error(generated(one(1), None, **given), generated(one(1), negative_prompt=OTHER)) < 1e-4
    del given["negative_prompt_embeds"]
    assert relative_error(generated(one(1), None, **given), generated(one(1))) < 1e-4


@slow
@pytest.mark.parametrize(
    ("version", "settings"),
    [
        (1, {"devices": 2}),
        (1, {"devices": 8, "split_batch": False}),
        (2, {"devices": 4}),
    ],
    ids=str,
)
def test_full_sync_equals_one_device(pipe_on, one, version, settings):
    many = pipe_on(version, **settings, sync_mode="full_sync")
    assert relative_error(generated(many), generated(one(version))) < 1e-4


@slow
def test_images_of_a_batch_are_those_of_single_calls(one):
    pair = generated(one(1), [PROMPT, OTHER], seed=[3, 4], num_images_per_prompt=1)
    assert pair.shape == (2, *LATENT)
    assert relative_error(pair[1:], generated(one(1), OTHER, seed=4)) < 1e-4


@slow
def test_warm_up_and_progress_count_calls_of_the_unet(pipe_on, monkeypatch, capsys):
    """PNDM makes four of them for three steps, of which warmup_steps + 1 are exact."""

    def steps(**settings) -> list[np.ndarray]:
        pipe = pipe_on(1, devices=2, split_batch=False, **settings)
        monkeypatch.setattr(pipe, "_progress", {})
        seen = trajectory(pipe, num_inference_steps=3)
        assert "4/4" in capsys.readouterr().err
        return seen

    got, wanted = steps(warmup_steps=1), steps(sync_mode="full_sync")
    errors = [relative_error(*both) for both in zip(got, wanted, strict=True)]
    assert len(errors) == 4
    assert max(errors[:2]) < 1e-6
    assert min(errors[2:]) > 1e-5


def test_default_size_is_the_models(one):
    assert one(1).default_size == (128, 128)


def test_old_names_of_the_vaes_attention_are_read(tiny_sd_checkpoints, tmp_path, one):
    """As Stable Diffusion's own files have them."""
    folder = shutil.copytree(tiny_sd_checkpoints[1], tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        return functools.reduce(lambda text, pair: text.replace(*pair), names.items(), name)

    tensors = load_file(file)
    renamed = {old(name): tensor for name, tensor in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) == 16
    save_file(renamed, file)
    pipe = DistriSDPipeline.from_pretrained(folder, DistriConfig(devices=1))
    for got, wanted in zip(pipe._vae.params, one(1)._vae.params, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_the_right_pipeline_is_found(tiny_checkpoint, tiny_sd_checkpoints):
    assert type(load_pipeline(tiny_sd_checkpoints[2], DistriConfig(devices=1))) is DistriSDPipeline
    assert type(load_pipeline(tiny_checkpoint, DistriConfig(devices=1), scheduler="ddim")) is DistriSDXLPipeline


CHECKPOINTS = {
    "folder of SDXL": (
        entry("model_index.json", _class_name="StableDiffusionXLPipeline"),
        ["Stable Diffusion XL", "DistriSDXLPipeline"],
    ),
    "UNet of SDXL": (
        entry(
            "unet/config.json",
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        ),
        ["addition_embed_type", "'text_time'", "text encoder", "pooled"],
    ),
    "UNet of another text encoder": (
        entry("unet/config.json", cross_attention_dim=64),
        ["cross_attention_dim", 64, "text encoder", 32],
    ),
    "Runge-Kutta steps": (
        entry("scheduler/scheduler_config.json", skip_prk_steps=False),
        ["skip_prk_steps", "False", "true"],
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_refused(kind, tiny_sd_checkpoints, tmp_path):
    damage, told = CHECKPOINTS[kind]
    folder = shutil.copytree(tiny_sd_checkpoints[1], tmp_path / "model")
    damage(folder)
    with refuses(*told) as error:
        DistriSDPipeline.from_pretrained(folder, DistriConfig(devices=1))
    one_sentence(str(error.value))


@slow
def test_what_encode_prompt_returns_takes_the_place_of_prompts(pipe_on):
    pipe = pipe_on(1, devices=2)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    text, negative = pipe.encode_prompt("a", "b", clip_skip=1)
    given = pipe(prompt_embeds=text, negative_prompt_embeds=negative, **call).images
    np.testing.assert_array_equal(given, pipe("a", negative_prompt="b", clip_skip=1, **call).images)


CALLS = {
    "no prompt": ({"prompt": None}, ["prompt", "string"]),
    "prompt and embeddings": (
        {"prompt_embeds": np.zeros((1, 77, 32))},
        ["prompt", "prompt_embeds"],
    ),
    "embeddings of wrong width": (
        {"prompt": None, "prompt_embeds": np.zeros((1, 77, 64))},
        ["prompt_embeds", "[1, 77, 64]", "[prompts, tokens, 32]"],
    ),
    "negative embeddings of wrong length": (
        {
            "prompt": None,
            "prompt_embeds": np.zeros((1, 77, 32)),
            "negative_prompt_embeds": np.zeros((1, 50, 32)),
        },
        ["negative", "[1, 50, 32]", "[1, 77, 32]"],
    ),
    "negative prompts": ({"negative_prompt": ["a", "b"]}, ["negative_prompt", 2, 1]),
    "clip skip": ({"clip_skip": 4}, ["clip_skip", 4, 0, 3]),
    "width": ({"width": 65}, ["width", 65, 8, 64, 72]),
    "steps": ({"num_inference_steps": 1000}, ["steps_offset 1", 1000, "timestep"]),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_wrong_call_is_refused_before_anything_is_compiled(kind, pipe_on):
    arguments, told = CALLS[kind]
    pipe = pipe_on(1, devices=1)
    with refuses(*told) as error:
        pipe(**{"prompt": "a", "height": 64, "width": 64, "num_inference_steps": 2, **arguments})
    one_sentence(str(error.value))
    assert pipe.programs.count == 0
