"""Compiled programs, kept by what they depend on, so that compile time is known apart from run time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from distrijax.config import DistriError

OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
        "xla_gpu_all_gather_combine_threshold_bytes": 1_000_000,
        "xla_gpu_collective_permute_combine_threshold_bytes": 1_000_000,
    },
}
"""XLA's options for each of JAX's platforms.

Without the latency-hiding scheduler nothing travels while a GPU computes; with one collective at a time, those that wait
their turn begin too late. What many layers ask for is small and is combined, but not into anything large: XLA would otherwise
have the first GroupNorm wait for the keys and values of a layer far behind it.
"""

Params = tuple[jax.Array, ...]
"""The leaves of a module, as a compiled program takes them: quick to hand over, whatever the module's depth."""


class Programs:
    """Compiles `function(static, params, *arguments)` once for each static value and each shape of the arguments.

    platform: JAX's name for the devices'. options: XLA's, instead of those of `OPTIONS` or beside them.
    seconds: spent tracing and compiling so far. count: how many programs that made.
    """

    def __init__(self, platform: str, options: Mapping[str, Any] | None = None):
        self.platform = platform
        self.options = {**OPTIONS.get(platform, {}), **(options or {})}
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
            self._compiled[key] = compiled(jitted.lower(static, params, *arguments), self.options)
            self.seconds += time.perf_counter() - start
        result = self._compiled[key](params, *arguments)
        # virtual CPU devices share one pool of threads: with a second program in it, the collectives of the first may wait
        # for ever for a device that gets no thread
        return jax.block_until_ready(result) if self.platform == "cpu" else result


def compiled(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> jax.stages.Compiled:
    """The program, compiled with XLA's options; raises DistriError for one that XLA does not know, or a wrong value."""
    try:
        return lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error) or not any(name in str(error) for name in options):
            raise
        raise DistriError(f"XLA refuses a compiler option ({error}); leave it out or correct it") from None


@functools.cache
def _cuts(sharding: NamedSharding) -> Hashable:
    """A sharding without the mesh axes of size 1, which JAX may name or not: they cut nothing."""
    parts = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    cuts = [tuple(axis for axis in axes if axis and sharding.mesh.shape[axis] > 1) for axes in parts]
    while cuts and not cuts[-1]:
        cuts.pop()
    return sharding.mesh, tuple(cuts)
