"""Which steps of a call are synchronous."""

from __future__ import annotations

import pytest

from distrijax import DistriConfig


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
