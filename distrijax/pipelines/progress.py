"""The progress bar of a run, which does not keep the devices waiting."""

from __future__ import annotations

from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from distrijax.parallel.threads import wait

NO_MESH = Mesh(np.empty((), object), ())


class Progress:
    """tqdm's bar of the steps that the devices have done; a context.

    The host waits for steps only after it has handed over those that follow, and for the last ones at the end: for a large
    model handing over takes it milliseconds, in which the devices would have nothing to do.
    total: steps. settings: tqdm's.
    """

    def __init__(self, total: int, **settings: Any):
        self._bar = tqdm(total=total, **settings)
        self._running: tuple[int, jax.Array] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            if raised[0] is None:
                self._wait()
        finally:
            self._bar.close()

    def handed_over(self, steps: int, result: jax.Array) -> None:
        """The devices have so many more steps to do, of which `result` comes; waits for those before.

        Whoever called may donate `result` to a program: what is waited for is a number out of it.
        """
        if not self._bar.disable:
            with jax.set_mesh(NO_MESH):  # whoever calls may be within a mesh of other devices
                number = _first(result.addressable_shards[0].data)
            self._wait()
            self._running = steps, number

    def _wait(self) -> None:
        """Until what was handed over last is done."""
        if self._running is not None:
            steps, number = self._running
            wait(number)
            self._bar.update(steps)
            self._running = None


@jax.jit
def _first(array: jax.Array) -> jax.Array:
    return array[(0,) * array.ndim]
