"""What a pipeline has fixed, what each call may choose, and where it may be called."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from facts import refuses

from distrijax import (
    CheckpointError,
    DistriConfig,
    DistriSDXLPipeline,
    InvalidArgument,
    SyncMode,
    load_pipeline,
    with_class,
)

CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(shallow_checkpoint) -> DistriSDXLPipeline:
    made = load_pipeline(
        shallow_checkpoint, DistriConfig(devices=jax.devices()[2:4], split_batch=False, warmup_steps=0)
    )
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe: DistriSDXLPipeline, **arguments) -> np.ndarray:
    return np.asarray(pipe("a", **CALL, **arguments).images)


def test_the_devices_that_are_given_are_used_in_their_order(pipe, shallow_checkpoint):
    assert pipe.config.devices == tuple(jax.devices()[2:4]) and hash(pipe.config)
    assert list(pipe.mesh.devices.flat) == jax.devices()[2:4]
    assert pipe("a", **CALL).images.devices() == set(jax.devices()[2:4])


@pytest.mark.parametrize(
    ("devices", "facts"),
    [
        ([], ["devices", "[]"]),
        ("cpu", ["devices", "'cpu'"]),
        ([0, 1], ["devices", "[0, 1]", "jax.devices()"]),
        (lambda: jax.devices()[:1] * 2, ["devices", "different"]),
    ],
)
def test_devices_that_are_none_are_refused(devices, facts):
    with refuses(*facts, error=InvalidArgument):
        DistriConfig(devices=devices() if callable(devices) else devices)


@pytest.mark.parametrize(
    "change",
    [{"devices": 1}, {"devices": None}, {"parallelism": "tensor"}, {"shard_weights": True}, {"split_batch": True}],
    ids=str,
)
def test_a_config_that_needs_another_mesh_or_other_weights_is_refused(pipe, change):
    with refuses(*change, error=InvalidArgument):
        pipe.config = dataclasses.replace(pipe.config, **change)


@pytest.mark.parametrize("name", ["mesh", "dtype", "unet_config", "vae_config", "programs"])
def test_what_programs_depend_on_is_not_replaced(pipe, name):
    with refuses(name, error=InvalidArgument):
        setattr(pipe, name, getattr(pipe, name))


def test_another_sync_mode_takes_effect(pipe):
    before, config = latents(pipe), pipe.config
    try:
        pipe.config = dataclasses.replace(config, sync_mode=SyncMode.FULL_SYNC)
        assert not np.array_equal(latents(pipe), before)
    finally:
        pipe.config = config
    np.testing.assert_array_equal(latents(pipe), before)


def test_a_calls_scheduler_is_its_own(pipe):
    before = latents(pipe)
    by_name, given = latents(pipe, scheduler="ddim"), latents(pipe, scheduler=with_class(pipe.scheduler, "ddim"))
    np.testing.assert_array_equal(by_name, given)
    assert not np.array_equal(by_name, before)
    np.testing.assert_array_equal(latents(pipe), before)


@pytest.mark.parametrize(("scheduler", "fact"), [("eular", "'eular'"), (3, "3")])
def test_a_scheduler_that_is_none_is_refused(pipe, scheduler, fact):
    with refuses("scheduler", fact, "euler", error=InvalidArgument):
        pipe("a", scheduler=scheduler, **CALL)


def test_a_call_inside_jit_is_refused(pipe):
    with refuses("jax.jit", error=InvalidArgument):
        jax.jit(lambda x: pipe("a", **CALL).images.sum() + x)(1.0)


def test_what_is_wrong_with_a_checkpoint_is_told_from_what_is_wrong_with_arguments(pipe, tmp_path):
    with refuses("model_index.json", error=CheckpointError):
        load_pipeline(tmp_path)
    with refuses("width", 63, error=InvalidArgument):
        pipe("a", height=64, width=63)
