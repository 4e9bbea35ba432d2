"""Compiled programs: which of them run at the same time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrijax.programs import Programs


def slow_sum(static, params, x):
    """A second or so of additions."""
    return jax.lax.fori_loop(0, 300, lambda _, total: total + jnp.sin(x + total), x)


def test_in_turn_waits_for_the_end_of_a_program():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(np.ones((8, 20_000), np.float32), NamedSharding(mesh, P("x")))
    result = Programs(in_turn=True)(slow_sum, None, (), x)
    assert result.is_ready()
