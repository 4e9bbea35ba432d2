"""Calls that begin with an image, at half of the schedule: equal to torch diffusers' image-to-image for every scheduler."""

from __future__ import annotations

from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from calls import LATENT, PROMPT, SIZE
from diffusers import StableDiffusionXLImg2ImgPipeline
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from marks import slow, slow_but
from oracle import relative_error
from tiny_pipeline import load_torch_pipeline

from distrijax import SCHEDULERS, DistriConfig, DistriSDXLPipeline
from distrijax.pipelines.call import image_seeds
from distrijax.sampling.begin import FromLatents
from distrijax.sampling.noise import Stream, band_noise, image_keys
from distrijax.schedulers import with_class

STEPS, SEED = 6, 5


def load(checkpoint, **settings) -> DistriSDXLPipeline:
    pipe = DistriSDXLPipeline.from_pretrained(checkpoint, DistriConfig(**settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def one(shallow_checkpoint):
    return load(shallow_checkpoint, devices=1, sync_mode="full_sync")


@pytest.fixture(scope="module")
def theirs(shallow_checkpoint):
    return StableDiffusionXLImg2ImgPipeline(**load_torch_pipeline(shallow_checkpoint).components)


def from_image(pipe: DistriSDXLPipeline, image: np.ndarray, start: int, **arguments: Any) -> np.ndarray:
    """Latents of a call that begins with the latents of an image."""
    call = pipe.call_type.of(PROMPT, **SIZE, num_inference_steps=STEPS, seed=SEED, output_type="latent", **arguments)
    request = pipe._read(call)._replace(begin=FromLatents(image, start))
    return np.asarray(pipe._generate(request).images)


def own_noise(number: int) -> np.ndarray:
    """Noise [1, c, h, w] of this project's seed."""
    channels, rows, columns = LATENT
    keys = image_keys(jnp.asarray(image_seeds(SEED, 1)))
    return np.moveaxis(np.asarray(band_noise(keys, int(Stream.IMAGE) + number, 0, (rows, columns, channels))), -1, 1)


@pytest.mark.parametrize("name", slow_but(["dpm++2m"], SCHEDULERS))
def test_a_call_that_begins_at_half_the_schedule_equals_torch_diffusers(name, one, theirs, monkeypatch):
    scheduler = with_class(one.scheduler, name)
    kind = getattr(diffusers, scheduler.diffusers_name)
    options = {key: value for key, value in scheduler.to_config().items() if not key.startswith("_")}
    monkeypatch.setattr(theirs, "scheduler", kind.from_config(options))
    image, start = 0.5 * np.random.default_rng(0).standard_normal((1, *LATENT), np.float32), STEPS // 2
    fresh = (torch.from_numpy(own_noise(number).copy()) for number in range(start + 1, 100))
    for module in (scheduling_lcm, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))
    noise = torch.randn((1, *LATENT), generator=torch.Generator().manual_seed(3))  # as the pipeline draws it
    wanted = theirs(
        PROMPT,
        image=torch.from_numpy(image),
        strength=0.5,
        num_inference_steps=STEPS,
        original_size=(SIZE["height"], SIZE["width"]),
        target_size=(SIZE["height"], SIZE["width"]),
        generator=torch.Generator().manual_seed(3),
        guidance_scale=5.0,
        output_type="latent",
    ).images
    got = from_image(one, image, start, latents=noise.numpy(), scheduler=scheduler)
    assert relative_error(got, wanted) < 1e-3


def test_the_image_gets_noise_of_a_stream_of_its_own(one):
    image = np.zeros((1, *LATENT), np.float32)
    got = from_image(one, image, 3)
    assert relative_error(got, from_image(one, image, 3, latents=own_noise(0))) < 1e-5
    assert relative_error(got, from_image(one, image, 3, latents=own_noise(-int(Stream.IMAGE)))) > 0.1


@slow
def test_many_devices_equal_one(shallow_checkpoint, one):
    image = np.random.default_rng(0).standard_normal((1, *LATENT), np.float32)
    many = load(shallow_checkpoint, devices=8, sync_mode="full_sync")
    assert relative_error(from_image(many, image, 3), from_image(one, image, 3)) < 1e-4


@slow
def test_the_warm_up_is_counted_from_the_first_step_that_runs(shallow_checkpoint, one):
    image = np.random.default_rng(0).standard_normal((1, *LATENT), np.float32)
    many = load(shallow_checkpoint, devices=4, warmup_steps=2)
    assert relative_error(from_image(many, image, 3), from_image(one, image, 3)) < 1e-4
    assert relative_error(from_image(many, image, 1), from_image(one, image, 1)) > 1e-4
