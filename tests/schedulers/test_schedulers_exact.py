"""The mathematics of schedulers: models and images for which the exact answer is known."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_runs import IMAGE, SDXL_BETAS, SHAPE, ZERO_SNR, fake_model, made, noises, run

from distrijax.schedulers import (
    DDIM,
    LCM,
    PNDM,
    DPMSolverPP2M,
    Euler,
    EulerAncestral,
    common,
)


@pytest.mark.parametrize("kind", ZERO_SNR)
@pytest.mark.parametrize("zero_snr", (False, True))
def test_a_model_of_the_image_gives_the_same_as_one_of_the_velocity(kind, zero_snr):
    config = SDXL_BETAS | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_snr}
    config |= {"clip_sample": False} if kind is DDIM else {}
    cumulative_alphas = kind(**config).cumulative_alphas()

    def image_model(latents, timestep):
        alpha = math.sqrt(cumulative_alphas[int(timestep)])
        velocity = fake_model(latents, timestep)
        return np.float32(alpha) * np.asarray(latents) - np.float32(math.sqrt(1 - alpha**2)) * velocity

    _, by_image = run(kind(**config, prediction_type="sample"), 10, image_model)
    _, by_velocity = run(kind(**config, prediction_type="v_prediction"), 10)
    for a, b in zip(by_image, by_velocity, strict=True):
        # where nothing is left of the image the Euler schedulers see 2**-12 of it and the model's table here does not
        np.testing.assert_allclose(a, b, rtol=0, atol=(1e-3 if zero_snr else 1e-5) * np.abs(b).max())


# Images whose values are normally distributed: the best prediction and the probability flow have closed forms.
MEAN, SPREAD = 0.8, 0.4


def gaussian_noise_prediction(latents, alpha, sigma):
    return sigma * (latents - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


def gaussian_flow(latents, level, final_level):
    """Where the probability flow takes latents of one noise level (sigma / alpha) on another."""
    alpha, final_alpha = 1 / np.sqrt(level**2 + 1), 1 / np.sqrt(final_level**2 + 1)
    width = np.sqrt(SPREAD**2 + final_level**2) / np.sqrt(SPREAD**2 + level**2)
    return final_alpha * (MEAN + (latents / alpha - MEAN) * width)


def gaussian_error(scheduler, steps):
    """The largest distance between the sampled latents and those at the end of the exact flow."""
    constants, init_noise_sigma = scheduler.schedule(steps)
    table = common.sigma_table(scheduler.cumulative_alphas()).astype(np.float64)
    if getattr(scheduler, "use_karras_sigmas", False):
        levels = common.karras_sigmas(table[-1], table[0], steps)  # their timesteps are rounded
    else:
        levels = np.interp(constants.timestep, np.arange(1000), table)
    remaining = iter(levels)

    def model(latents, timestep):
        alpha = 1 / np.sqrt((level := next(remaining)) ** 2 + 1)
        return gaussian_noise_prediction(np.asarray(latents), alpha, level * alpha)

    sampled = run(scheduler, steps, model)[1][-1]
    first_step = jax.tree.map(lambda column: column[0], constants)
    start = scheduler.scale_input(scheduler.init(jnp.asarray(noises(steps)[0]), init_noise_sigma).latents, first_step)
    final_level = table[0] if getattr(scheduler, "final_sigmas_type", "zero") == "sigma_min" else 0.0
    return np.abs(sampled - gaussian_flow(start, levels[0], final_level)).max()


@pytest.mark.parametrize(
    "scheduler, order",
    [
        (DDIM(**SDXL_BETAS, timestep_spacing="trailing", clip_sample=False), 1),
        (Euler(**SDXL_BETAS, timestep_spacing="trailing"), 1),
        (Euler(**SDXL_BETAS, use_karras_sigmas=True), 1),
        (DPMSolverPP2M(**SDXL_BETAS, use_karras_sigmas=True, final_sigmas_type="sigma_min", solver_order=1), 1),
        (DPMSolverPP2M(**SDXL_BETAS, use_karras_sigmas=True, final_sigmas_type="sigma_min"), 2),
        (DPMSolverPP2M(**SDXL_BETAS, use_karras_sigmas=True, final_sigmas_type="sigma_min", solver_type="heun"), 2),
    ],
    ids=("ddim", "euler", "euler-karras", "dpm++1", "dpm++2m-midpoint", "dpm++2m-heun"),
)
def test_the_exact_flow_of_a_gaussian_is_approached_at_the_solvers_order(scheduler, order):
    errors = [gaussian_error(scheduler, steps) for steps in (25, 50, 100)]
    for coarse, fine in itertools.pairwise(errors):
        assert 0.75 * 2**order < coarse / fine < 1.4 * 2**order, errors


@pytest.mark.parametrize("kind", (DDIM, Euler, DPMSolverPP2M, EulerAncestral, LCM))
@pytest.mark.parametrize("start", (0, 1, 5, 9))
def test_a_call_that_begins_with_an_image_ends_with_it_if_the_model_sees_it(kind, start):
    """Not PNDM's, which skips a timestep as diffusers' does."""
    options = {"clip_sample": False} if kind in (DDIM, LCM) else {}
    config = {"prediction_type": "sample", "timestep_spacing": "trailing"}
    _, trajectory = run(kind(**SDXL_BETAS, **config, **options), 10, lambda latents, timestep: IMAGE, start=start)
    np.testing.assert_allclose(trajectory[-1], IMAGE, rtol=0, atol=1e-5)


def test_ancestral_sampling_of_a_gaussian_has_its_mean_and_spread():
    scheduler = EulerAncestral(**SDXL_BETAS)
    steps, init_noise_sigma = scheduler.schedule(500)
    alphas = steps.input_scale
    key, start_key = jax.random.split(jax.random.key(0))
    state = scheduler.init(jax.random.normal(start_key, (1, 100, 100, 1)), init_noise_sigma)

    def body(state, inputs):
        step, alpha, key = inputs
        latents = scheduler.scale_input(state.latents, step)
        model_output = gaussian_noise_prediction(latents, alpha, jnp.sqrt(1 - alpha**2))
        return scheduler.update(state, model_output, step, jax.random.normal(key, latents.shape)), None

    state, _ = jax.lax.scan(body, state, (steps, jnp.asarray(alphas), jax.random.split(key, 500)))
    assert abs(state.latents.mean() - MEAN) < 0.015
    assert abs(state.latents.std() - SPREAD) < 0.015


def test_lcm_answers_with_the_image_and_goes_back_with_fresh_noise_alone():
    """Of latents that are nothing but noise, a model that sees the image keeps none: steps are independent draws around it."""
    scheduler = LCM(prediction_type="sample")
    _, trajectory = run(scheduler, 4, lambda latents, timestep: np.full(SHAPE, 0.7, np.float32))
    squares = scheduler.cumulative_alphas()[[759, 499, 259]]
    _, *fresh = noises(4)
    for latents, squared, noise in zip(trajectory[:3], squares, fresh, strict=False):
        # what the boundary conditions leave of the latents is 1 / (40 timestep)^2
        np.testing.assert_allclose(
            latents, math.sqrt(squared) * 0.7 + math.sqrt(1 - squared) * noise, rtol=0, atol=1e-5
        )
    np.testing.assert_allclose(trajectory[3], 0.7, rtol=0, atol=1e-5)


def test_pndm_stays_on_the_path_of_a_noise_that_does_not_change():
    scheduler = made(PNDM, **SDXL_BETAS, steps_offset=1)
    image, noise = 0.7, noises(1)[1]
    squares = scheduler.cumulative_alphas().astype(np.float64)

    def at(timestep):
        return math.sqrt(squares[int(timestep)]) * image + math.sqrt(1 - squares[int(timestep)]) * noise

    constants, _ = scheduler.schedule(20)
    state = scheduler.init(jnp.asarray(at(constants.timestep[0]), jnp.float32), 1.0)
    for i in range(21):
        step = jax.tree.map(lambda column, i=i: column[i], constants)
        state = scheduler.update(state, jnp.asarray(noise), step)
        after = constants.timestep[max(i, 1)] - (
            0 if i <= 1 else 50
        )  # both of the first two calls arrive at the second
        np.testing.assert_allclose(state.latents, at(max(after, 0)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
def test_pndm_integrates_polynomials_of_the_degree_that_its_history_allows(prediction):
    """Of x^n at this call's place 0 and at the places of the history the step takes the mean over its width, 1 / (n + 1)."""
    constants, _ = made(PNDM, prediction_type=prediction, timestep_spacing="trailing").schedule(8)
    weights = np.stack([getattr(constants, f"from_output{suffix}") for suffix in ("", "_1", "_2", "_3")], -1)
    weights = weights / weights.sum(-1, keepdims=True)
    places = [[0, 0, 0, 0], [1, 0, 0, 0], *[[0, -1, -2, -3]] * 7]  # the second call looks back at the step's beginning
    for call, (row, place) in enumerate(zip(weights, places, strict=True)):
        for degree in range(min(max(call, 1), 4)):
            assert np.dot(row, np.power(place, float(degree))) == pytest.approx(1 / (degree + 1), abs=1e-5), (
                call,
                degree,
            )


def test_pndm_visits_the_second_timestep_twice_and_begins_again_from_the_first_latents():
    scheduler = made(PNDM, **SDXL_BETAS, steps_offset=1)
    constants, _ = scheduler.schedule(4)
    assert constants.timestep.tolist() == [751, 501, 501, 251, 1]
    assert constants.moves.tolist() == [1, 0, 1, 1, 1]
    assert (constants.from_latents == 0).tolist() == (constants.from_start != 0).tolist() == [i == 1 for i in range(5)]
    assert scheduler.schedule(1)[0].timestep.tolist() == [1]
