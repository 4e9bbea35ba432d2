"""Every scheduler against diffusers, step by step, with a closed-form model; its options, and its mathematics."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from facts import refuses
from jax.sharding import PartitionSpec as P

from distrijax.schedulers import (
    DDIM,
    LCM,
    PNDM,
    SCHEDULERS,
    DPMSolverPP2M,
    Euler,
    EulerAncestral,
    common,
    load_scheduler,
    with_class,
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

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning:diffusers")


def made(kind, **options):
    """A scheduler of this class; PNDM's default is a form of it that is not supported."""
    return kind(**({"skip_prk_steps": True} if kind is PNDM else {}), **options)


def fake_model(latents, timestep):
    """Something smooth that depends on both; the same numpy code serves both sides."""
    return (np.tanh(0.7 * np.asarray(latents)) + 0.1 * math.sin(timestep)).astype(np.float32)


def noises(steps, seed=0):
    """The starting noise and one fresh noise for each step."""
    return np.random.default_rng(seed).standard_normal((steps + 1, *SHAPE), np.float32)


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


def run_diffusers(name, config, steps, monkeypatch, double=False):
    """(timesteps, latents after each step) of diffusers' scheduler."""
    dtype = torch.float64 if double else torch.float32
    start, *fresh = torch.from_numpy(noises(steps)).to(dtype)
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # otherwise a repeated first timestep is skipped
    trajectory, fresh = [], iter(fresh)
    with monkeypatch.context() as patch:
        for module in (scheduling_euler_ancestral_discrete, scheduling_lcm):
            patch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))
        if double:
            in_float64(scheduler, patch)
        latents = start * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            model_output = fake_model(scheduler.scale_model_input(latents, timestep), timestep.item())
            latents = scheduler.step(torch.from_numpy(model_output).to(dtype), timestep, latents).prev_sample
            trajectory.append(latents.numpy())
    return scheduler.timesteps.numpy(), trajectory


def run(scheduler, steps, model=fake_model):
    """(timesteps, latents after each step) of this project's scheduler, one step at a time."""
    start, *fresh = noises(steps)
    constants, init_noise_sigma = scheduler.schedule(steps)
    state, trajectory = scheduler.init(jnp.asarray(start), init_noise_sigma), []
    for i in range(len(constants.timestep)):
        step = jax.tree.map(lambda column, i=i: column[i], constants)
        model_output = model(scheduler.scale_input(state.latents, step), float(step.timestep))
        noise = jnp.asarray(fresh[i]) if scheduler.needs_noise else None
        state = scheduler.update(state, jnp.asarray(model_output), step, noise)
        trajectory.append(np.asarray(state.latents))
    return constants.timestep, trajectory


def assert_agrees(kind, config, steps, monkeypatch, *, double):
    """The same timesteps, and at every step a relative error (largest difference over largest value) under 1e-5.

    double: let diffusers step in float64, for schedules that begin at a sigma of thousands, where its float32
    arithmetic loses more than 1e-5. Their tables are float32 all the same, and the last digits of torch's roots and products
    are the processor's affair, so 1e-4 has to do.
    """
    timesteps, expected = run_diffusers(kind.diffusers_name, config, steps, monkeypatch, double)
    own_timesteps, own = run(load_scheduler({"_class_name": kind.diffusers_name, **config}), steps)
    # Karras timesteps are looked up by sigma, and so show the last digit of torch.linspace, which the CPU decides
    np.testing.assert_allclose(own_timesteps, timesteps, rtol=0, atol=5e-3 if config.get("use_karras_sigmas") else 0)
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(own, expected, strict=True)]
    assert max(errors) < (1e-4 if double else 1e-5), f"relative errors by step: {errors}"


def cases():
    for kind, prediction, spacing, zero_snr, steps in itertools.product(
        CLASSES,
        ("epsilon", "v_prediction", "sample"),
        ("leading", "trailing", "linspace"),
        (False, True),
        (1, 2, 5, 20, 50),
    ):
        if kind in (EulerAncestral, PNDM) and prediction == "sample":
            continue  # diffusers does not have it; see test_a_model_of_the_image_gives_the_same_as_one_of_the_noise
        if kind is PNDM and zero_snr:
            continue  # no option of PNDM
        if kind is DDIM and prediction == "epsilon" and zero_snr and (spacing, steps) in WITHOUT_IMAGE:
            continue  # diffusers divides by zero; see test_noise_prediction_where_no_image_is_left_is_refused
        if kind is LCM and (spacing != "leading" or (prediction == "epsilon" and zero_snr)):
            continue  # the one says nothing, the other as above
        for karras in (False, True) if kind in (Euler, DPMSolverPP2M) else (None,):
            options = {"prediction_type": prediction, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero_snr}
            name = f"{kind.__name__}-{prediction}-{spacing}-{'zero_snr' if zero_snr else 'snr'}-{steps}"
            if karras is not None:
                options["use_karras_sigmas"] = karras
                name += "-karras" if karras else ""
            yield pytest.param(kind, options, steps, id=name)


WITHOUT_IMAGE = {("trailing", n) for n in (1, 2, 5, 20, 50)} | {("linspace", n) for n in (2, 5, 20, 50)}


@pytest.mark.parametrize("kind, options, steps", list(cases()))
def test_every_step_agrees_with_diffusers(kind, options, steps, monkeypatch):
    config = SDXL_BETAS | {"steps_offset": 1} | options
    if kind is PNDM:
        config |= {"skip_prk_steps": True}
        del config["rescale_betas_zero_snr"]
    assert_agrees(kind, config, steps, monkeypatch, double=options["rescale_betas_zero_snr"])


TRAILING = SDXL_BETAS | {"timestep_spacing": "trailing", "steps_offset": 1}
FEW_STEPS = {
    "lightning": (Euler, TRAILING),
    "lightning of one step": (Euler, TRAILING | {"prediction_type": "sample"}),
    "lightning to the smallest sigma": (Euler, TRAILING | {"final_sigmas_type": "sigma_min"}),
    "turbo": (EulerAncestral, TRAILING),
    "lcm": (LCM, SDXL_BETAS | {"steps_offset": 1, "thresholding": False, "original_inference_steps": 50}),
}


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("case", FEW_STEPS)
def test_one_to_eight_steps_of_distilled_models_agree_with_diffusers(case, steps, monkeypatch):
    kind, config = FEW_STEPS[case]
    assert_agrees(kind, config, steps, monkeypatch, double=False)


def random_config(kind, choose):
    """A config with every option of the class drawn at random, and a number of steps."""
    train = choose.choice((40, 200, 1000))
    config = {
        "num_train_timesteps": train,
        "beta_start": choose.choice((0.0001, 0.00085)),
        "beta_end": choose.choice((0.012, 0.02)),
        "beta_schedule": choose.choice(("linear", "scaled_linear", "squaredcos_cap_v2")),
        "trained_betas": choose.choice((None, None, None, [0.0002 + 0.01 * (i / train) ** 2 for i in range(train)])),
        "prediction_type": choose.choice(("epsilon", "v_prediction", "sample")),
        "timestep_spacing": choose.choice(("leading", "trailing", "linspace")),
        "steps_offset": choose.choice((0, 1, 3)) if train > 40 else 0,
        "rescale_betas_zero_snr": choose.choice((False, False, True)),
    }
    karras = choose.choice((False, True))
    final = choose.choice(("zero", "sigma_min"))
    match kind.__name__:
        case "DDIM":
            config["clip_sample"] = choose.choice((False, True))
            config["clip_sample_range"] = choose.choice((0.5, 2))
            config["set_alpha_to_one"] = choose.choice((False, True))
            if config["prediction_type"] == "epsilon":
                config["rescale_betas_zero_snr"] = False
        case "Euler":
            config |= {"use_karras_sigmas": karras, "final_sigmas_type": final}
            config["sigma_max"] = choose.choice((None, 12.0))
            config["sigma_min"] = choose.choice((None, 0.05))
        case "PNDM":
            del config["rescale_betas_zero_snr"]
            config |= {"skip_prk_steps": True, "set_alpha_to_one": choose.choice((False, True))}
            config["prediction_type"] = choose.choice(("epsilon", "v_prediction"))
        case "EulerAncestral":
            config["prediction_type"] = choose.choice(("epsilon", "v_prediction"))
        case "DPMSolverPP2M":
            config |= {"use_karras_sigmas": karras, "final_sigmas_type": final}
            config["solver_order"] = choose.choice((1, 2))
            # of equal levels, with which Karras sigmas end at sigma_min, diffusers' heun makes 0 / 0
            config["solver_type"] = choose.choice(("midpoint", "midpoint" if karras else "heun"))
            config["lower_order_final"] = choose.choice((False, True))
            config["euler_at_final"] = choose.choice((False, True))
        case "LCM":
            config["original_inference_steps"] = choose.choice((30, 37, 40))
            config["timestep_scaling"] = choose.choice((1.0, 10.0))
            config["clip_sample"] = choose.choice((False, True))
            config["clip_sample_range"] = choose.choice((0.5, 2))
            if config["prediction_type"] == "epsilon":
                config["rescale_betas_zero_snr"] = False
    steps = choose.randint(1, 30)
    if len(np.arange(train, 0, -train / steps)) != steps:
        config["timestep_spacing"] = "leading"  # see test_trailing_spacing_never_takes_a_step_too_many
    return config, steps


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_of_options_agrees_with_diffusers(kind, seed, monkeypatch):
    config, steps = random_config(kind, random.Random(f"{kind.__name__} {seed}"))
    assert_agrees(kind, config, steps, monkeypatch, double=True)


@pytest.mark.parametrize("zero_snr, tolerance", ((False, 0), (True, 1e-5)))
def test_the_table_of_alphas_is_that_of_diffusers(zero_snr, tolerance):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    config = {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": zero_snr}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod
    np.testing.assert_allclose(DDIM.from_config(config).cumulative_alphas(), expected, rtol=tolerance)


@pytest.mark.parametrize("steps", (13, 14, 15, 16))
def test_the_last_step_is_of_lower_order_below_fifteen_steps(steps, monkeypatch):
    assert_agrees(DPMSolverPP2M, SDXL_BETAS | {"final_sigmas_type": "sigma_min"}, steps, monkeypatch, double=False)


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


def test_steps_that_do_not_fit_the_spacing_are_refused():
    with refuses("'leading'", 999):
        DPMSolverPP2M(timestep_spacing="leading").schedule(1000)
    for kind in (DDIM, PNDM):
        with refuses("steps_offset 1", 1000):
            made(kind, steps_offset=1, timestep_spacing="leading").schedule(1000)
    with refuses("num_inference_steps", 51, 50):
        LCM().schedule(51)


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


def test_the_scheduler_config_of_sdxl_is_read():
    scheduler = load_scheduler(SDXL_CONFIG)
    assert scheduler == Euler(**SDXL_BETAS, steps_offset=1, timestep_spacing="leading")
    assert scheduler.to_config() == {key: value for key, value in SDXL_CONFIG.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "config",
    [
        SDXL_CONFIG,
        {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"},
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 2},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun", "rescale_betas_zero_snr": True},
        {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 2, "predict_x0": True},
    ],
    ids=lambda config: config["_class_name"],
)
def test_a_change_of_class_keeps_the_options_that_diffusers_keeps(config, name):
    scheduler = load_scheduler(config, name)
    theirs = getattr(diffusers, type(scheduler).diffusers_name).from_config(
        getattr(diffusers, config["_class_name"]).from_config(config).config
    )
    for field in dataclasses.fields(scheduler):
        if field.name not in ("_source", *SCHEDULERS[name][1]):  # which the name decides
            assert getattr(scheduler, field.name) == theirs.config[field.name], field.name
    assert getattr(scheduler, "use_karras_sigmas", None) in (None, name.endswith("karras"))
    # and by way of every other class
    for between in SCHEDULERS.keys() - {"euler-trailing"}:  # whose spacing the next class would keep
        if not config["_class_name"].startswith(("DPM", "UniPC")):
            assert with_class(load_scheduler(config, between), name) == scheduler


def test_options_take_the_place_of_the_configs_and_of_the_names():
    lightning = load_scheduler(SDXL_CONFIG, "euler-trailing", {"prediction_type": "sample"})
    assert lightning == Euler(**SDXL_BETAS, steps_offset=1, timestep_spacing="trailing", prediction_type="sample")
    assert load_scheduler(lightning.to_config() | {"_class_name": "EulerDiscreteScheduler"}) == lightning
    assert load_scheduler(SDXL_CONFIG, options={"timestep_spacing": "linspace"}).timestep_spacing == "linspace"
    assert load_scheduler(SDXL_CONFIG, "lcm", {"original_inference_steps": 100}).original_inference_steps == 100


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        (None, {"original_inference_steps": 50}, "original_inference_steps EulerDiscreteScheduler"),
        ("lcm", {"timestep_spacing": "trailing"}, "timestep_spacing LCMScheduler"),
        ("euler", {"timestep_spacing": "even"}, "timestep_spacing 'even' leading trailing"),
        ("euler", {"_source": ()}, "_source"),
    ],
)
def test_options_that_say_nothing_are_refused(name, options, told):
    with refuses(*told.split()):
        load_scheduler(SDXL_CONFIG, name, options)


def test_a_change_of_class_keeps_options_given_in_code():
    scheduler = with_class(Euler(steps_offset=3, prediction_type="v_prediction", use_karras_sigmas=True), "ddim")
    assert scheduler == DDIM(steps_offset=3, prediction_type="v_prediction")
    changed = dataclasses.replace(load_scheduler(SDXL_CONFIG), steps_offset=0)
    assert with_class(changed, "ddim").steps_offset == 0


def test_equal_options_make_equal_schedulers_whatever_they_were_read_from():
    read = load_scheduler(SDXL_CONFIG)
    made = Euler(**SDXL_BETAS, steps_offset=1, timestep_spacing="leading")
    assert hash(read) == hash(made) and read == made
    assert made != dataclasses.replace(made, steps_offset=0)


@pytest.mark.parametrize(
    "config, told",
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "'UniPCMultistepScheduler' DDIMScheduler ddim"),
        ({}, "scheduler None DDIMScheduler"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "cosine"}, "beta_schedule 'cosine' linear scaled_linear"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow"}, "prediction_type 'flow' epsilon v_prediction"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "even"}, "timestep_spacing 'even' leading trailing"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding True False"),
        ({"_class_name": "DDIMScheduler", "clip_sample": "no"}, "clip_sample 'no' true false"),
        ({"_class_name": "DDIMScheduler", "clip_sample_range": -1}, "clip_sample_range -1 0"),
        ({"_class_name": "DDIMScheduler", "steps_offset": -1}, "steps_offset -1 0"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 0}, "num_train_timesteps 0 2"),
        ({"_class_name": "DDIMScheduler", "beta_start": 2}, "beta_start 2 0 1"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1]}, "trained_betas null 1000"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0] * 1000}, "trained_betas 0 1"),
        ({"_class_name": "DDIMScheduler", "beta_strat": 0.1}, "'beta_strat' 'beta_start'"),
        ({"_class_name": "EulerDiscreteScheduler", "s_churn": 0.5}, "key 's_churn'"),
        ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type 'linear'"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'discrete'"),
        ({"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True}, "use_exponential_sigmas True"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas True"),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "one"}, "'one' zero sigma_min"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": "14"}, "sigma_max '14' 0"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "'dpmsolver++'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order 3 1 2"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_type": "bh2"}, "solver_type 'bh2' midpoint heun"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped -5.1"),
        ({"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned"}, "variance_type 'learned'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "thresholding True"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 0}, "original_inference_steps 0 1"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 1001}, "original_inference_steps 1001 1000"),
        ({"_class_name": "LCMScheduler", "timestep_scaling": 0}, "timestep_scaling 0"),
        ({"_class_name": "LCMScheduler", "clip_sample": 1}, "clip_sample 1 true false"),
        ({"_class_name": "LCMScheduler", "thresholding": True}, "thresholding True"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps False true"),
        (
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "sample"},
            "PNDM epsilon v_prediction",
        ),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": 1}, "set_alpha_to_one 1 true"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence(config, told):
    with refuses(*told.split()):
        load_scheduler(config)


def test_an_unknown_name_is_refused():
    with refuses("scheduler", "'heun'", "ddim", "euler"):
        load_scheduler(SDXL_CONFIG, "heun")
