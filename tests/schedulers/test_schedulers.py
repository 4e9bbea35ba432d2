"""How schedulers run: as a scan, on a band of rows, in which dtypes, for how many steps."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import refuses
from jax.sharding import PartitionSpec as P
from scheduler_runs import CLASSES, IMAGE, SDXL_CONFIG, SHAPE, SPACED, made, noises, run, step_of

from distrijax.schedulers import (
    DDIM,
    LCM,
    PNDM,
    SCHEDULERS,
    DPMSolverPP2M,
    Euler,
    load_scheduler,
)


@pytest.mark.parametrize("kind", (DDIM, LCM))
def test_noise_prediction_where_no_image_is_left_is_refused(kind):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with refuses("999", "v_prediction"):
        kind(**config).schedule(20)
    for prediction in ("v_prediction", "sample"):
        assert_finite(kind(**config, prediction_type=prediction), 20)


def test_trailing_spacing_never_takes_a_step_too_many():
    # 1000 / 61 is rounded such that diffusers' arange yields 62 timesteps, the last of them -1
    for kind in SPACED:
        steps, _ = made(kind, timestep_spacing="trailing").schedule(61)
        assert len(steps.timestep) == (62 if kind is PNDM else 61)
        assert steps.timestep[-1] == round(1000 / 61) - 1


def sample(scheduler, steps, init_noise_sigma, start, fresh, dtype=jnp.float32):
    """The whole loop as one scan; returns the latents after each call of the model."""

    def body(state, inputs):
        step, noise = inputs
        latents = scheduler.scale_input(state.latents, step)
        model_output = jnp.tanh(0.7 * latents) + 0.1 * jnp.sin(step.timestep)
        state = scheduler.update(state, model_output.astype(dtype), step, noise if scheduler.needs_noise else None)
        return state, state.latents

    return jax.lax.scan(body, scheduler.init(start, init_noise_sigma), (steps, fresh))[1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scan_over_the_steps_equals_a_python_loop(name):
    scheduler = load_scheduler(SDXL_CONFIG, name)
    steps, sigma = scheduler.schedule(7)
    start, *fresh = noises(len(steps.timestep))
    compiled = jax.jit(sample, static_argnames=("scheduler", "dtype"))
    trajectory = compiled(scheduler, steps, sigma, jnp.asarray(start), jnp.stack(fresh))
    for a, b in zip(trajectory, run(scheduler, 7)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@functools.partial(jax.jit, static_argnames="scheduler")
def sample_image(scheduler, steps, image, noise, fresh):
    """The whole loop from an image on."""
    return sample(scheduler, steps, 1.0, scheduler.add_noise(image, noise, step_of(steps, 0)), fresh)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_call_that_begins_at_another_step_takes_the_same_program(name):
    scheduler = load_scheduler(SDXL_CONFIG, name)
    image, compiled = jnp.asarray(IMAGE), sample_image._cache_size()
    for count, start in ((10, 5), (7, 2), (5, 0)):
        steps, _ = scheduler.schedule(count, start)
        assert len(steps.timestep) == (6 if name == "pndm" else 5)
        noise, *fresh = map(jnp.asarray, noises(count)[: len(steps.timestep) + 1])
        if name == "pndm":
            fresh = [noise] * 6  # which is not used
        trajectory = sample_image(scheduler, steps, image, noise, jnp.stack(fresh))
        for a, b in zip(trajectory, run(scheduler, count, start=start)[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    assert sample_image._cache_size() == compiled + 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_band_of_rows_is_updated_like_the_whole_image(name):
    scheduler = load_scheduler(SDXL_CONFIG, name)
    steps, sigma = scheduler.schedule(5)
    start, *fresh = noises(len(steps.timestep))
    start, fresh = jnp.asarray(start), jnp.stack(fresh)
    mesh = jax.make_mesh((4,), ("patch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P(None, None, "patch")
    banded = jax.shard_map(
        lambda *arguments: sample(scheduler, *arguments),
        mesh=mesh,
        in_specs=(P(), P(), P(None, "patch"), rows),
        out_specs=rows,
    )
    arguments = (jax.tree.map(jnp.asarray, steps), jnp.float32(sigma), start, fresh)
    whole = np.asarray(sample(scheduler, *arguments))
    np.testing.assert_allclose(jax.jit(banded)(*arguments), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_state_and_constants_are_float32_with_a_bfloat16_model(name):
    scheduler = load_scheduler(SDXL_CONFIG, name)
    steps, sigma = scheduler.schedule(3)
    calls = 4 if name == "pndm" else 3
    assert all(column.shape == (calls,) and column.dtype == np.float32 for column in steps)
    start, *fresh = jnp.asarray(noises(calls), jnp.bfloat16)
    state = scheduler.init(start, sigma)
    for i in range(calls):
        step = jax.tree.map(lambda column, i=i: column[i], steps)
        assert scheduler.scale_input(state.latents, step).dtype == np.float32
        state = scheduler.update(state, start, step, fresh[i] if scheduler.needs_noise else None)
        assert all(leaf.dtype == np.float32 and leaf.shape == SHAPE for leaf in jax.tree.leaves(state))


def assert_finite(scheduler, steps):
    constants, sigma = scheduler.schedule(steps)
    assert all(np.isfinite(column).all() for column in constants) and math.isfinite(sigma)
    calls = steps + 1 if isinstance(scheduler, PNDM) and steps > 1 else steps
    assert all(len(column) == calls for column in constants)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("spacing", ("leading", "trailing", "linspace"))
@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
def test_constants_are_finite_for_any_number_of_steps(kind, spacing, prediction):
    options = [{}]
    if kind in (Euler, DPMSolverPP2M):
        options = [
            {"use_karras_sigmas": karras, "final_sigmas_type": final}
            for karras in (False, True)
            for final in ("zero", "sigma_min")
        ]
    if kind is DPMSolverPP2M:
        options = [{**option, "solver_type": solver} for option in options for solver in ("midpoint", "heun")]
    if kind is LCM:
        options = [{"original_inference_steps": 1000}]
    most = 999 if kind is DPMSolverPP2M and spacing == "leading" else 1000
    for option, steps in itertools.product(options, (1, 2, 3, 15, 334, 501, 999, most)):
        assert_finite(made(kind, **option, timestep_spacing=spacing, prediction_type=prediction), steps)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("steps", (0, -1, 1001, 2.0, True, "20", None))
def test_a_wrong_number_of_steps_is_refused(kind, steps):
    with refuses("num_inference_steps", repr(steps)):
        made(kind).schedule(steps)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("start", (-1, 2.0, True, "2", None))
def test_a_wrong_start_is_refused(kind, start):
    with refuses("start", repr(start), "whole number"):
        made(kind).schedule(5, start)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_start_behind_the_last_step_is_refused(kind):
    calls = 6 if kind is PNDM else 5
    with refuses("start", calls, calls - 1):
        made(kind).schedule(5, calls)
    for last in (calls - 1, np.int64(calls - 1), jnp.array(calls - 1)):
        assert len(made(kind).schedule(5, last)[0].timestep) == 1


def test_noise_prediction_is_possible_where_an_image_is_left():
    """The first step of these schedules is refused; see test_noise_prediction_where_no_image_is_left_is_refused."""
    for kind in (DDIM, LCM):
        steps, _ = kind(rescale_betas_zero_snr=True, timestep_spacing="trailing").schedule(20, 1)
        assert all(np.isfinite(column).all() for column in steps)


def test_steps_that_do_not_fit_the_spacing_are_refused():
    with refuses("'leading'", 999):
        DPMSolverPP2M(timestep_spacing="leading").schedule(1000)
    for kind in (DDIM, PNDM):
        with refuses("steps_offset 1", 1000):
            made(kind, steps_offset=1, timestep_spacing="leading").schedule(1000)
    with refuses("num_inference_steps", 51, 50):
        LCM().schedule(51)
