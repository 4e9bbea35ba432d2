"""Which steps of a call are synchronous, and which numbers and flags are taken."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from facts import refuses

from distrijax import DistriConfig, DistriError
from distrijax.config import StepKind
from distrijax.validate import finite_number, flag, positive


@pytest.mark.parametrize(
    ("warmup_steps", "sync_steps", "steps", "wanted"),
    [
        (4, (), 8, "11111000"),
        (0, (), 3, "100"),
        (4, (), 2, "11"),
        (1, (-1,), 6, "110001"),
        (1, (3, -2, 1), 6, "110110"),
        (0, range(0, 9, 3), 9, "100100100"),
        (0, (5, -5), 4, "1000"),  # steps that this call does not have
    ],
)
def test_synchronous_steps(warmup_steps, sync_steps, steps, wanted):
    config = DistriConfig(warmup_steps=warmup_steps, sync_steps=sync_steps)
    assert "".join(str(int(kind is StepKind.SYNCHRONOUS)) for kind in config.step_kinds(steps)) == wanted
    assert hash(config) == hash(DistriConfig(warmup_steps=warmup_steps, sync_steps=list(sync_steps)))


def test_numpys_whole_numbers_and_flags_become_pythons():
    given = {"devices": np.int64(8), "cfg": np.int32(2), "warmup_steps": np.uint8(0), "extrapolate": np.True_}
    config = DistriConfig(**given, sync_steps=np.arange(2))
    assert config == DistriConfig(devices=8, cfg=2, warmup_steps=0, extrapolate=True, sync_steps=(0, 1))
    fields = dataclasses.asdict(config)
    assert {type(fields[name]) for name in given} == {int, bool}
    assert set(map(type, config.sync_steps)) == {int}
    assert type(positive(np.int64(1024), "height")) is int


@pytest.mark.parametrize("array", [np.array, jnp.asarray, torch.tensor])
def test_any_librarys_arrays_without_dimensions_are_numbers(array):
    assert DistriConfig(warmup_steps=array(3), sync_steps=array([1, -2])) == DistriConfig(
        warmup_steps=3, sync_steps=(1, -2)
    )
    assert DistriConfig(sync_steps=array(2), extrapolate=array(True)) == DistriConfig(sync_steps=2, extrapolate=True)
    taken = [
        positive(array(4), "height"),
        finite_number(array(0.5), "guidance_scale"),
        flag(array(False), "split_batch"),
    ]
    assert taken == [4, 0.5, False] and [type(value) for value in taken] == [int, float, bool]
    for wrong in (array(True), array([1.0]), array(float("nan")), np.array("1"), jax.random.key(0)):
        with pytest.raises(DistriError, match=r"\bguidance_scale\b"):
            finite_number(wrong, "guidance_scale")
    for wrong in (array(True), array([4]), array(4.0), array(0), np.array("4"), jax.random.key(0)):
        with pytest.raises(DistriError, match=r"\bheight\b"):
            positive(wrong, "height")


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float32(1), "1", None])
def test_what_is_no_whole_number_is_refused(value):
    with refuses("height", f"{value}", 1):
        positive(value, "height")
    with refuses("sync_steps", repr(value)):
        DistriConfig(sync_steps=[value])


@pytest.mark.parametrize("name", ["extrapolate", "shard_weights", "split_batch"])
@pytest.mark.parametrize("value", ["no", "false", 1, None])
def test_flags_are_true_or_false(name, value):
    with refuses(name, repr(value), "true", "false"):
        DistriConfig(**{name: value})
