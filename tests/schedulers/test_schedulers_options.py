"""Options of schedulers: configs that are read, changes of class, and what is refused."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
from facts import refuses
from scheduler_runs import SDXL_BETAS, SDXL_CONFIG

from distrijax.schedulers import (
    DDIM,
    SCHEDULERS,
    Euler,
    load_scheduler,
    with_class,
)


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
