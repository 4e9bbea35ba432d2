"""Distilled models, one to eight steps: LCM (a UNet that is conditioned on the guidance scale), Lightning and Turbo, against torch
diffusers on one device, many devices against one, and what is refused or told."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from calls import LATENT, PROMPT, SIZE, generated, trajectory
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from facts import refuses, says, warns
from marks import slow, slow_but
from oracle import relative_error
from test_traffic import received_by_hlo
from tiny_pipeline import SHALLOW, load_torch_pipeline, save_tiny_pipeline, save_tiny_sd_pipeline

from distrijax import DistriConfig, DistriWarning, load_pipeline
from distrijax.cli import generate
from distrijax.parallel.mesh import MeshPlan
from distrijax.pipelines.build import Pipeline
from distrijax.pipelines.call import image_seeds
from distrijax.plan.traffic import traffic
from distrijax.sampling.denoise import STEPS
from distrijax.sampling.noise import band_noise, image_keys

GUIDANCE_DISTILLED = {"time_cond_proj_dim": 32}


@pytest.fixture(scope="module")
def lcm_checkpoints(tmp_path_factory):
    """Small random checkpoints like LCM's, by family."""
    folders = {family: tmp_path_factory.mktemp(f"lcm-{family}") for family in ("xl", "1.x")}
    save_tiny_pipeline(
        folders["xl"], scheduler=LCMScheduler(original_inference_steps=40), **GUIDANCE_DISTILLED, **SHALLOW
    )
    save_tiny_sd_pipeline(
        folders["1.x"], 1, scheduler=LCMScheduler(steps_offset=1, clip_sample=False), **GUIDANCE_DISTILLED
    )
    return folders


@pytest.fixture(scope="module")
def checkpoints(lcm_checkpoints, shallow_checkpoint):
    """Those, and one whose UNet is told nothing, of which Lightning's and Turbo's have the structure."""
    return lcm_checkpoints | {"usual": shallow_checkpoint}


@pytest.fixture(scope="module")
def pipe_on(checkpoints):
    """A pipeline by its checkpoint, its scheduler with options, and its configuration: pipe_on("xl", devices=4)."""

    @functools.lru_cache(2)
    def load(name: str, scheduler: str | None = None, options: tuple = (), **settings) -> Pipeline:
        config = DistriConfig(**settings)
        pipe = load_pipeline(checkpoints[name], config, scheduler=scheduler, scheduler_options=dict(options))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def one(pipe_on):
    """An LCM on one device."""
    return pipe_on("xl", devices=1)


@pytest.fixture(scope="module")
def stale(pipe_on):
    """An LCM on four devices, displaced after two exact steps."""
    return pipe_on("xl", devices=4, warmup_steps=1)


@pytest.fixture
def same_noise(monkeypatch):
    """Has diffusers' schedulers draw, from its first step on, the noise of this project's seed."""

    def draw_as(seed: int) -> None:
        (key,), steps = image_keys(jnp.asarray(image_seeds(seed, 1))), iter(range(1, 100))

        def noise(*_, **__) -> torch.Tensor:
            channels, rows, columns = LATENT
            drawn = np.asarray(band_noise(key[None], next(steps), 0, (rows, columns, channels)))
            return torch.from_numpy(np.moveaxis(drawn, -1, 1).copy())

        for module in (scheduling_lcm, scheduling_euler_ancestral_discrete):
            monkeypatch.setattr(module, "randn_tensor", noise)

    return draw_as


TRAILING = (("timestep_spacing", "trailing"),)
SAMPLE = (("prediction_type", "sample"),)
ORACLES = {
    "lcm": ("xl", None, (), None, {"guidance_scale": 8.0}),
    "lcm, one step": ("xl", None, (), None, {"guidance_scale": 1.5, "num_inference_steps": 1}),
    "lcm of 1.x": ("1.x", None, (), None, {"guidance_scale": 7.5}),
    "lcm without guidance": ("1.x", None, (), None, {"guidance_scale": 0.0, "num_inference_steps": 2}),
    "lcm scheduler, guided": ("usual", "lcm", (), LCMScheduler, {"guidance_scale": 2.0, "num_inference_steps": 3}),
    "lightning": ("usual", "euler-trailing", (), EulerDiscreteScheduler, {"guidance_scale": 0.0}),
    "lightning, one step": (
        "usual",
        "euler-trailing",
        SAMPLE,
        EulerDiscreteScheduler,
        {"guidance_scale": 0.0, "num_inference_steps": 1},
    ),
    "turbo": (
        "usual",
        "euler-ancestral",
        TRAILING,
        EulerAncestralDiscreteScheduler,
        {"guidance_scale": 0.0, "num_inference_steps": 3},
    ),
}


@pytest.mark.parametrize("case", slow_but(["lcm"], ORACLES))
def test_one_device_equals_torch_diffusers(case, checkpoints, pipe_on, same_noise):
    name, scheduler, options, kind, settings = ORACLES[case]
    ours, theirs = pipe_on(name, scheduler, options, devices=1), load_torch_pipeline(checkpoints[name])
    if kind is not None:
        spacing = {} if kind is LCMScheduler else {"timestep_spacing": "trailing"}
        theirs.scheduler = kind.from_config(theirs.scheduler.config, **spacing | dict(options))
    noise, call = torch.randn(1, *LATENT), SIZE | {"num_inference_steps": 4} | settings
    same_noise(5)
    wanted = theirs(PROMPT, **call, latents=noise.clone(), output_type="latent").images
    assert relative_error(generated(ours, latents=noise.numpy(), seed=5, **settings), wanted) < 1e-3


def test_the_guidance_scale_changes_the_image_and_compiles_nothing(one):
    images, count = [generated(one, guidance_scale=8.0)], one.programs.count
    for scale in (0.0, 1.0, 7.9):
        images.append(generated(one, guidance_scale=scale, num_inference_steps=4))
        assert min(relative_error(images[-1], other) for other in images[:-1]) > 1e-3
    generated(one, guidance_scale=3.0, num_inference_steps=8)
    assert one.programs.count == count


EXACT = {
    "8 bands": {"devices": 8, "sync_mode": "full_sync"},
    "8 bands, fewer steps than the warm-up": {"devices": 8},
    "shared weights": {"devices": 2, "shard_weights": True},
    "tensor": {"devices": 4, "parallelism": "tensor"},
    "data": {"devices": 4, "data": 2, "sync_mode": "full_sync"},
}


@slow
@pytest.mark.parametrize("case", EXACT)
def test_many_devices_equal_one(case, pipe_on, one):
    many = pipe_on("xl", **EXACT[case])
    assert many.mesh.shape["cfg"] == 1
    call = {"guidance_scale": 6.0, "num_images_per_prompt": 2}
    assert relative_error(generated(many, **call), generated(one, **call)) < 1e-4


@slow
def test_displaced_steps_come_after_the_warm_up(stale, one):
    got, wanted = (trajectory(pipe, guidance_scale=6.0) for pipe in (stale, one))
    errors = [relative_error(*both) for both in zip(got, wanted, strict=True)]
    assert max(errors[:2]) < 1e-4
    assert min(errors[2:]) > 1e-5 and max(errors[2:]) < 0.5


@slow
def test_naive_patches_are_told_the_guidance_scale(pipe_on, one):
    """Each band equals one device's image of the band's size."""
    noise = np.random.default_rng(1).standard_normal((1, *LATENT), np.float32)
    pipe = pipe_on("xl", devices=2, parallelism="naive_patch", split_scheme="row")
    call = {"guidance_scale": 6.0, "num_inference_steps": 1}
    got = generated(pipe, latents=noise, **call)
    sizes = {"original_size": (256, 64), "target_size": (256, 64)}
    for band, start in zip(np.split(got, 2, 2), np.split(noise, 2, 2), strict=True):
        assert relative_error(band, generated(one, height=128, latents=start, **sizes, **call)) < 1e-4


@slow
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 5.0])
def test_a_single_step_on_eight_devices_is_exact_with_the_usual_warm_up(guidance_scale, pipe_on):
    many, one = (pipe_on("usual", "euler-trailing", SAMPLE, devices=devices) for devices in (8, 1))
    assert many.mesh.shape["cfg"] == 2
    call = {"guidance_scale": guidance_scale, "num_inference_steps": 1}
    assert relative_error(generated(many, **call), generated(one, **call)) < 1e-4


@slow
def test_what_the_first_call_needs_is_compiled_while_weights_are_read(lcm_checkpoints):
    call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 8.0}
    pipe = load_pipeline(lcm_checkpoints["xl"], DistriConfig(devices=2, warmup_steps=1), compile_for=call)
    pipe.set_progress_bar_config(disable=True)
    before = pipe.programs.count
    pipe(**call)
    assert pipe.programs.count == before


@slow
def test_the_plan_is_that_of_the_compiled_program(stale):
    generated(stale)
    (displaced,) = (
        program.result()
        for (stage, static, *_), program in stale.programs._compiled.items()
        if stage is STEPS and static.rules[0].reads
    )
    planned = traffic(stale.config, stale.unet_config, stale.scheduler, devices=4, latent=LATENT[1:], dtype=stale.dtype)
    assert planned.mesh == MeshPlan(1, 1, 4)
    assert planned.patches == 4
    assert sum(planned.received.values()) == received_by_hlo(displaced.as_text())


def test_the_command_line_plans_a_single_branch(lcm_checkpoints, capsys):
    generate.main(["--model", str(lcm_checkpoints["xl"]), "--plan", "--devices", "8", "--guidance-scale", "8"])
    mesh, *_ = capsys.readouterr().out.splitlines()
    says(mesh, "data 1", "cfg 1", "patch 8")


def test_options_of_the_scheduler_are_numbers_flags_or_words():
    flags = [f"--scheduler-option={pair}" for pair in ("timestep_spacing=trailing", "sigma_max=12.5", "x=true")]
    wanted = {"timestep_spacing": "trailing", "sigma_max": 12.5, "x": True}
    assert generate.parse(flags).scheduler_option == wanted


def test_a_split_of_the_single_branch_is_refused(lcm_checkpoints):
    with refuses("cfg", 2, "UNet", 1):
        load_pipeline(lcm_checkpoints["xl"], DistriConfig(devices=2, cfg=2))


def test_more_steps_than_the_model_was_distilled_on_are_refused(one):
    with refuses("num_inference_steps", 41, 40):
        generated(one, num_inference_steps=41)


@pytest.mark.parametrize(
    "given",
    [
        {"negative_prompt": "a square"},
        {"negative_prompt_2": "a", "guidance_rescale": 0.5},
        {"negative_original_size": (64, 64), "negative_target_size": (9, 9)},
    ],
    ids=["negative prompt", "both", "negative sizes"],
)
def test_what_only_two_branches_would_heed_is_told(given, one):
    with warns(*given, "UNet"):
        got = generated(one, guidance_scale=8.0, **given)
    np.testing.assert_array_equal(got, generated(one, guidance_scale=8.0))


def test_further_exact_steps_are_not_idle_where_they_make_all_steps_exact(pipe_on):
    pipe = pipe_on("xl", devices=4, extrapolate=True, warmup_steps=2, sync_steps=(-1,))
    with refuses(
        "extrapolate", "warmup_steps 2", "sync_steps [-1]", 4, error=DistriWarning
    ):  # warnings are errors here: before anything is compiled
        generated(pipe)


def test_options_of_displaced_steps_are_told_where_there_are_none(pipe_on):
    pipe = pipe_on("xl", devices=4, extrapolate=True, compress="int8")
    with refuses(
        "extrapolate", "compress", "warmup_steps 4", "4 steps", error=DistriWarning
    ):  # warnings are errors here: before anything is compiled
        generated(pipe)
