"""The progress bar of a run, which does not keep the devices waiting."""

from __future__ import annotations

from typing import Any, Self

import jax
from tqdm import tqdm


class Progress:
    """tqdm's bar of the steps that the devices have done; a context.

    The host waits for steps only after it has handed over those that follow: for a large model that takes it milliseconds,
    in which the devices would have nothing to do.
    total: steps. settings: tqdm's.
    """

    def __init__(self, total: int, **settings: Any):
        self._bar = tqdm(total=total, **settings)
        self._running: tuple[int, jax.Array] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised == (None, None, None):
            self._wait()
        self._bar.close()

    def handed_over(self, steps: int, result: jax.Array) -> None:
        """The devices have so many more steps to do, of which `result` comes; waits for those before.

        Whoever called may donate `result` to a program: what is waited for is a copy of the part of it on one device.
        """
        if not self._bar.disable:
            part = result.addressable_shards[0]
            copy = jax.device_put(part.data, part.device, may_alias=False)
            self._wait()
            self._running = steps, copy

    def _wait(self) -> None:
        """Until what was handed over last is done."""
        if self._running is not None:
            steps, copy = self._running
            jax.block_until_ready(copy)
            self._bar.update(steps)
            self._running = None
