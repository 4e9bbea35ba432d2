"""Compiled programs, kept by what they depend on, so that compile time is known apart from run time."""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from distrijax.config import DistriError, DistriWarning
from distrijax.processes import is_first

OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_analytical_sol_latency_estimator": False,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
        "xla_gpu_all_gather_combine_threshold_bytes": 1_000_000,
        "xla_gpu_collective_permute_combine_threshold_bytes": 1_000_000,
    },
}
"""XLA's options for each of JAX's platforms.

Without the latency-hiding scheduler nothing travels while a GPU computes; by its model of Hopper's links what is small need not
be hidden; with one collective at a time, those that wait their turn begin too late. Only what is small is combined: XLA would
otherwise have the first GroupNorm wait for the keys and values of a layer far behind it.
"""

Params = tuple[jax.Array, ...]
"""The leaves of a module, as a compiled program takes them: quick to hand over, whatever the module's depth."""


class Programs:
    """Compiles `function(static, params, *arguments)` once for each static value and each shape of the arguments.

    platform: JAX's name for the devices'. options: a user's for XLA, before those of `OPTIONS`.
    seconds: spent tracing and compiling so far. count: how many programs that made.
    """

    def __init__(self, platform: str, options: Mapping[str, Any] | None = None):
        self.platform = platform
        self.options = dict(options or {})
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
            program = compiled(jitted.lower(static, params, *arguments), self.platform, self.options)
            self.seconds += time.perf_counter() - start
            jax.block_until_ready(arguments)  # what made them has given back its memory
            check_memory(program, leaves[0].sharding.mesh.local_devices[0])
            self._compiled[key] = program
        result = self._compiled[key](params, *arguments)
        # virtual CPU devices share one pool of threads: with a second program in it, the collectives of the first may wait
        # for ever for a device that gets no thread
        return jax.block_until_ready(result) if self.platform == "cpu" else result


def compiled(lowered: jax.stages.Lowered, platform: str, options: Mapping[str, Any]) -> jax.stages.Compiled:
    """The program, compiled with the platform's `OPTIONS` and, before them, a user's.

    An option of ours that this version of XLA does not have is left out, with a DistriWarning. Raises DistriError for a
    user's that XLA does not have, or with a value that it does not take.
    """
    chosen = {**OPTIONS.get(platform, {}), **options}
    while True:
        try:
            return lowered.compile(compiler_options=chosen)
        except jax.errors.JaxRuntimeError as error:
            told = str(error)
            refused = next((name for name in chosen if re.search(rf"\b{re.escape(name)}\b", told)), None)
            if "INVALID_ARGUMENT" not in told or refused is None:
                raise
            if refused in options:
                raise DistriError(f"XLA refuses a compiler option ({told}); leave it out or correct it") from None
            told = f"this XLA has no option {refused}; less may be hidden behind computing"
            if is_first():
                warnings.warn(told, DistriWarning, stacklevel=2)
            del chosen[refused]


def check_memory(program: jax.stages.Compiled, device: jax.Device) -> None:
    """Raises DistriError for a program that would not fit beside what a device already holds, its arguments included."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:  # a platform that does not tell
        return
    analysis = program.memory_analysis()
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    used, limit = stats["bytes_in_use"], stats["bytes_limit"]
    if used + needed > limit:
        raise DistriError(
            f"the program needs {needed / 1e9:.3g} GB beside the {used / 1e9:.3g} GB in use, and a device has "
            f"{limit / 1e9:.3g} GB; use more devices, a smaller size or bfloat16"
        )


@functools.cache
def _cuts(sharding: NamedSharding) -> Hashable:
    """A sharding without the mesh axes of size 1, which JAX may name or not: they cut nothing."""
    parts = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    cuts = [tuple(axis for axis in axes if axis and sharding.mesh.shape[axis] > 1) for axes in parts]
    while cuts and not cuts[-1]:
        cuts.pop()
    return sharding.mesh, tuple(cuts)
