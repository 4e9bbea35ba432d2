"""Compiled programs, kept by what they depend on, so that compile time is known apart from run time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.sharding import NamedSharding

Params = tuple[jax.Array, ...]
"""The leaves of a module, as a compiled program takes them: quick to hand over, whatever the module's depth."""


class Programs:
    """Compiles `function(static, params, *arguments)` once for each static value and each shape of the arguments.

    in_turn: wait for each program's end. Virtual CPU devices share one pool of threads: with a second program in it, the
    collectives of the first may wait for ever for a device that gets no thread.
    seconds: spent tracing and compiling so far. count: how many programs that made.
    """

    def __init__(self, *, in_turn: bool = False):
        self.in_turn = in_turn
        self.seconds = 0.0
        self._compiled: dict[Hashable, Any] = {}

    @property
    def count(self) -> int:
        return len(self._compiled)

    def __call__(
        self, function: Callable, static: Hashable, params: Params, *arguments: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """Runs the program. donate: which of `arguments` (from 0) it may overwrite."""
        leaves, structure = jax.tree.flatten(arguments)
        key = (function, static, structure, tuple((leaf.shape, leaf.dtype, _cuts(leaf.sharding)) for leaf in leaves))
        if key not in self._compiled:
            start = time.perf_counter()
            jitted = jax.jit(function, static_argnums=0, donate_argnums=tuple(2 + index for index in donate))
            self._compiled[key] = jitted.lower(static, params, *arguments).compile()
            self.seconds += time.perf_counter() - start
        result = self._compiled[key](params, *arguments)
        return jax.block_until_ready(result) if self.in_turn else result


@functools.cache
def _cuts(sharding: NamedSharding) -> Hashable:
    """A sharding without the mesh axes of size 1, which JAX may name or not: they cut nothing."""
    parts = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    cuts = [tuple(axis for axis in axes if axis and sharding.mesh.shape[axis] > 1) for axes in parts]
    while cuts and not cuts[-1]:
        cuts.pop()
    return sharding.mesh, tuple(cuts)
