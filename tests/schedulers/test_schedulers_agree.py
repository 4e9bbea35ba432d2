"""Every scheduler against diffusers, step by step, with a closed-form model: every option, and mixtures of them."""

from __future__ import annotations

import itertools
import random

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scheduler_runs import CLASSES, IMAGE, SDXL_BETAS, assert_agrees, diffusers_scheduler, noises, step_of

from distrijax.schedulers import (
    DDIM,
    LCM,
    PNDM,
    SCHEDULERS,
    DPMSolverPP2M,
    Euler,
    EulerAncestral,
    load_scheduler,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning:diffusers")


def cases():
    for kind, prediction, spacing, zero_snr, steps in itertools.product(
        CLASSES,
        ("epsilon", "v_prediction", "sample"),
        ("leading", "trailing", "linspace"),
        (False, True),
        (1, 2, 5, 20, 50),
    ):
        if kind in (EulerAncestral, PNDM) and prediction == "sample":
            continue  # diffusers does not have it; see test_a_model_of_the_image_gives_the_same_as_one_of_the_velocity
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
    choose = random.Random(f"{kind.__name__} {seed}")
    config, steps = random_config(kind, choose)
    assert_agrees(kind, config, steps, monkeypatch, double=True)
    assert_agrees(kind, config, steps, monkeypatch, double=True, start=choose.randrange(steps))


@pytest.mark.parametrize("zero_snr, tolerance", ((False, 0), (True, 1e-5)))
def test_the_table_of_alphas_is_that_of_diffusers(zero_snr, tolerance):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    config = {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": zero_snr}
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod
    np.testing.assert_allclose(DDIM.from_config(config).cumulative_alphas(), expected, rtol=tolerance)


@pytest.mark.parametrize("start", (None, 5))
@pytest.mark.parametrize("steps", (13, 14, 15, 16))
def test_the_last_step_is_of_lower_order_if_the_whole_schedule_is_below_fifteen_steps(steps, start, monkeypatch):
    config = SDXL_BETAS | {"final_sigmas_type": "sigma_min"}
    assert_agrees(DPMSolverPP2M, config, steps, monkeypatch, double=False, start=start)


def named_cases():
    """Every name in SCHEDULERS with every spacing and prediction that it has."""
    for name, (kind, decided) in SCHEDULERS.items():
        spacings = ("leading", "trailing", "linspace")
        if "timestep_spacing" in kind.ignored | decided.keys():
            spacings = (decided.get("timestep_spacing", "leading"),)
        predictions = ("epsilon", "v_prediction", "sample")
        if kind in (EulerAncestral, PNDM):
            predictions = predictions[:2]  # as in cases
        for spacing, prediction in itertools.product(spacings, predictions):
            config = {"steps_offset": 1, "prediction_type": prediction, "timestep_spacing": spacing}
            yield pytest.param(kind, SDXL_BETAS | config | decided, id=f"{name}-{spacing}-{prediction}")


@pytest.mark.parametrize("steps, start", ((16, 8), (16, 0), (16, 1), (16, 15), (15, 13), (1, 0)))
@pytest.mark.parametrize("kind, config", list(named_cases()))
def test_a_call_that_begins_at_any_step_with_an_image_agrees_with_diffusers(kind, config, steps, start, monkeypatch):
    assert_agrees(kind, config, steps, monkeypatch, double=False, start=start)


def test_pndm_begins_at_its_last_call_too(monkeypatch):
    config = SDXL_BETAS | {"steps_offset": 1, "skip_prk_steps": True}
    assert_agrees(PNDM, config, 7, monkeypatch, double=False, start=7)  # one call more than there are steps


@pytest.mark.parametrize("kind, config", list(named_cases()))
def test_noise_is_added_as_in_diffusers_at_every_step(kind, config):
    scheduler = load_scheduler({"_class_name": kind.diffusers_name, **config})
    constants, _ = scheduler.schedule(20)
    noise = noises(0)[0]
    for start in range(len(constants.timestep)):
        theirs, timesteps = diffusers_scheduler(kind.diffusers_name, config, 20, start)
        expected = theirs.add_noise(torch.from_numpy(IMAGE), torch.from_numpy(noise), timesteps[:1]).numpy()
        noisy = scheduler.add_noise(jnp.asarray(IMAGE), jnp.asarray(noise), step_of(constants, start))
        np.testing.assert_allclose(noisy, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
