"""Schedulers stepped with a closed-form model: this project's, and those of diffusers."""

from __future__ import annotations

import math
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm

from distrijax.schedulers import (
    DDIM,
    LCM,
    PNDM,
    DPMSolverPP2M,
    Euler,
    EulerAncestral,
    load_scheduler,
)

CLASSES = (DDIM, Euler, EulerAncestral, DPMSolverPP2M, PNDM, LCM)
SPACED = CLASSES[:5]  # with a choice of timestep_spacing
ZERO_SNR = (DDIM, Euler, EulerAncestral, DPMSolverPP2M, LCM)  # that know rescale_betas_zero_snr
SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDXL_CONFIG = SDXL_BETAS | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SHAPE = (2, 4, 3, 4)


def made(kind, **options):
    """A scheduler of this class; PNDM's default is a form of it that is not supported."""
    return kind(**({"skip_prk_steps": True} if kind is PNDM else {}), **options)


def fake_model(latents, timestep):
    """Something smooth that depends on both; the same numpy code serves both sides."""
    return (np.tanh(0.7 * np.asarray(latents)) + 0.1 * math.sin(timestep)).astype(np.float32)


def noises(steps, seed=0):
    """The starting noise and one fresh noise for each step."""
    return np.random.default_rng(seed).standard_normal((steps + 1, *SHAPE), np.float32)


IMAGE = 0.5 * noises(0, seed=1)[0]
"""The latents without noise of a call that begins with an image."""


def step_of(constants, index):
    """The constants of one step."""
    return jax.tree.map(lambda column: column[index], constants)


class DoubleTorch:
    """torch, but what a scheduler casts to float32 becomes float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_float64(scheduler, monkeypatch):
    """Lets a diffusers scheduler take its steps in float64, with the float32 tables that it has made."""
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "torch", DoubleTorch())
    for table in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, table):
            setattr(scheduler, table, getattr(scheduler, table).double())


def diffusers_scheduler(name, config, steps, start=0):
    """diffusers' scheduler of a call that begins at the step with index `start`, and the timesteps from there on."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)  # at 0, too: otherwise a repeated first timestep is skipped
    return scheduler, scheduler.timesteps[start:]


def run_diffusers(name, config, steps, monkeypatch, double=False, start=None):
    """(timesteps, latents after each step) of diffusers' scheduler. `start`: as for `run`."""
    dtype = torch.float64 if double else torch.float32
    noise, *fresh = torch.from_numpy(noises(steps)).to(dtype)
    scheduler, timesteps = diffusers_scheduler(name, config, steps, start or 0)
    trajectory, fresh = [], iter(fresh)
    with monkeypatch.context() as patch:
        for module in (scheduling_euler_ancestral_discrete, scheduling_lcm):
            patch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))
        if double:
            in_float64(scheduler, patch)
        if start is None:
            latents = noise * scheduler.init_noise_sigma
        else:
            latents = scheduler.add_noise(torch.from_numpy(IMAGE).to(dtype), noise, timesteps[:1])
        for timestep in timesteps:
            model_output = fake_model(scheduler.scale_model_input(latents, timestep), timestep.item())
            latents = scheduler.step(torch.from_numpy(model_output).to(dtype), timestep, latents).prev_sample
            trajectory.append(latents.numpy())
    return timesteps.numpy(), trajectory


def run(scheduler, steps, model=fake_model, start=None):
    """(timesteps, latents after each step) of this project's scheduler, one step at a time.

    start: the index of the step at which a call begins with an image; None: it begins with noise alone.
    """
    noise, *fresh = map(jnp.asarray, noises(steps))
    constants, init_noise_sigma = scheduler.schedule(steps, start or 0)
    if start is None:
        state = scheduler.init(noise, init_noise_sigma)
    else:
        state = scheduler.init(scheduler.add_noise(jnp.asarray(IMAGE), noise, step_of(constants, 0)))
    trajectory = []
    for i in range(len(constants.timestep)):
        step = step_of(constants, i)
        model_output = model(scheduler.scale_input(state.latents, step), float(step.timestep))
        noise = fresh[i] if scheduler.needs_noise else None
        state = scheduler.update(state, jnp.asarray(model_output), step, noise)
        trajectory.append(np.asarray(state.latents))
    return constants.timestep, trajectory


def assert_agrees(kind, config, steps, monkeypatch, *, double, start=None):
    """The same timesteps, and at every step a relative error (largest difference over largest value) under 1e-5.

    double: let diffusers step in float64, for schedules that begin at a sigma of thousands, where its float32
    arithmetic loses more than 1e-5. Their tables are float32 all the same, and the last digits of torch's roots and products
    are the processor's affair, so 1e-4 has to do.
    start: as for `run`.
    """
    timesteps, expected = run_diffusers(kind.diffusers_name, config, steps, monkeypatch, double, start)
    own_timesteps, own = run(load_scheduler({"_class_name": kind.diffusers_name, **config}), steps, start=start)
    # Karras timesteps are looked up by sigma, and so show the last digit of torch.linspace, which the CPU decides
    np.testing.assert_allclose(own_timesteps, timesteps, rtol=0, atol=5e-3 if config.get("use_karras_sigmas") else 0)
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(own, expected, strict=True)]
    assert max(errors) < (1e-4 if double else 1e-5), f"relative errors by step: {errors}"
