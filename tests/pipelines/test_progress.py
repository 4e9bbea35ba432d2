"""The progress bar: one piece behind what the devices were given, and complete at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrijax.pipelines.progress import Progress

GIVEN_AWAY = jax.jit(lambda x: x + 1, donate_argnums=0)


def test_the_host_waits_for_the_steps_before_those_that_it_hands_over(monkeypatch, capsys):
    waited, block = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda array: waited.append(float(array)) or block(array))
    results = [jnp.full(3, float(value)) for value in (1, 2, 3)]
    with Progress(6) as progress:
        for index, (steps, result) in enumerate(zip((1, 2, 3), results, strict=True)):
            progress.dispatched(steps, result)
            assert waited == [1.0, 2.0][:index]
    assert waited == [1.0, 2.0, 3.0]
    assert "6/6" in capsys.readouterr().err


def test_a_result_may_be_given_away_before_it_is_waited_for():
    result = jnp.ones(3)
    with Progress(2, disable=False) as progress:
        progress.dispatched(1, result)
        following = GIVEN_AWAY(result)
        assert result.is_deleted()
        progress.dispatched(1, following)
    np.testing.assert_array_equal(following, 2.0)


def test_whoever_calls_may_be_within_a_mesh_of_other_devices(capsys):
    with jax.set_mesh(jax.make_mesh((2,), ("x",))), Progress(1) as progress:
        progress.dispatched(1, jax.device_put(np.ones(3), jax.devices()[2]))
    assert "1/1" in capsys.readouterr().err


def test_steps_that_are_not_done_do_not_count(capsys):
    def interrupted():
        with Progress(2) as progress:
            progress.dispatched(1, jnp.ones(3))
            raise ValueError("a callback's")

    with pytest.raises(ValueError, match="a callback's"):
        interrupted()
    assert "1/2" not in capsys.readouterr().err


def test_without_a_bar_nothing_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(jax, "block_until_ready", lambda array: pytest.fail("waited"))
    with Progress(1, disable=True) as progress:
        progress.dispatched(1, jnp.ones(3))
    assert capsys.readouterr().err == ""
