"""Which steps of a call are synchronous, and which numbers and flags are taken."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from distrijax import DistriConfig, DistriError
from distrijax.config import positive


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
    assert "".join(str(int(exact)) for exact in config.synchronous(steps)) == wanted
    assert hash(config) == hash(DistriConfig(warmup_steps=warmup_steps, sync_steps=list(sync_steps)))


def test_numpys_whole_numbers_and_flags_become_pythons():
    given = {"devices": np.int64(8), "cfg": np.int32(2), "warmup_steps": np.uint8(0), "extrapolate": np.True_}
    config = DistriConfig(**given, sync_steps=np.arange(2))
    assert config == DistriConfig(devices=8, cfg=2, warmup_steps=0, extrapolate=True, sync_steps=(0, 1))
    fields = dataclasses.asdict(config)
    assert {type(fields[name]) for name in given} == {int, bool}
    assert set(map(type, config.sync_steps)) == {int}
    assert type(positive(np.int64(1024), "height")) is int


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float32(1), "1", None])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(DistriError, match="height is .*; give a whole number of at least 1"):
        positive(value, "height")
    with pytest.raises(DistriError, match="sync_steps is .*; give whole numbers"):
        DistriConfig(sync_steps=[value])


@pytest.mark.parametrize("name", ["extrapolate", "shard_weights", "split_batch"])
@pytest.mark.parametrize("value", ["no", "false", 1, None])
def test_flags_are_true_or_false(name, value):
    with pytest.raises(DistriError, match=f"{name} is {value!r}; use true or false"):
        DistriConfig(**{name: value})
