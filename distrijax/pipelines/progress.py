"""The progress bar of a call, which does not keep the devices waiting."""

from __future__ import annotations

import sys
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from distrijax.parallel.threads import wait

NO_MESH = Mesh(np.empty((), object), ())


class Progress:
    """A context with tqdm's bar of the steps that the devices have finished.

    The host waits for steps only after it has dispatched those that follow them, and for the last ones at the end:
    dispatching a large model takes milliseconds, in which the devices would be idle.

    Args:
        total: Number of steps.
        **settings: tqdm's.
    """

    def __init__(self, total: int, **settings: Any):
        nowhere = sys.stderr is None and "file" not in settings  # as in a service
        self._bar = tqdm(total=total, **({"disable": True} if nowhere else settings))
        self._running: tuple[int, jax.Array] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            if raised[0] is None:
                self._wait()
        finally:
            self._bar.close()

    def dispatched(self, steps: int, result: jax.Array) -> None:
        """Notes that more steps have been dispatched, and waits for those before.

        Args:
            steps: Their number.
            result: An output of theirs. The caller may donate it afterwards: what is waited for is one element, copied.
        """
        if not self._bar.disable:
            with jax.set_mesh(NO_MESH):  # the caller may have set a mesh of other devices
                number = _first(result.addressable_shards[0].data)
            self._wait()
            self._running = steps, number

    def _wait(self) -> None:
        """Waits until the steps that were dispatched last are finished."""
        if self._running is not None:
            steps, number = self._running
            wait(number)
            self._bar.update(steps)
            self._running = None


@jax.jit
def _first(array: jax.Array) -> jax.Array:
    return array[(0,) * array.ndim]
