"""Compiled programs, kept by what they depend on, so that compile time is known apart from run time."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import NamedSharding

from distrijax.errors import DistriError, warn

OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_analytical_sol_latency_estimator": False,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 3,
        "xla_gpu_all_gather_combine_threshold_bytes": 1_000_000,
        "xla_gpu_collective_permute_combine_threshold_bytes": 16_000_000,
        "xla_gpu_enable_triton_gemm": False,
    },
    "tpu": {
        "xla_enable_async_collective_permute": True,
        "xla_max_concurrent_async_collective_permutes": 64,
    },
}
"""XLA's options for each of JAX's platforms.

Without the latency-hiding scheduler nothing travels while a GPU computes; by its model of Hopper's links what is small need not
be hidden; with one collective at a time, those that wait their turn begin too late, and with many, more is held at once. Only
small gathers are combined: XLA would otherwise have the first GroupNorm wait for the keys and values of a layer far behind it.
Boundary rows, which are small, travel all together, or at 3840x3840 half of them: one by one, some would get their turn where no
product hides them, and take that of the first GroupNorm's moments.
Products of matrices are cuBLAS's, which adds biases and residuals itself: XLA's own kernels need others around them.

On TPUs what is displaced comes by permutes, which can travel beside any computing. libtpu lets few of them travel at a time: those
that wait their turn then travel one after the other, where nothing hides them.

On CPUs YNNPACK computes sums and no more: its convolutions of up to 64 channels run on one core, and Eigen's products are faster.
"""

SHARDED: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_experimental_parallel_collective_overlap_limit": 8},
    "tpu": {
        "xla_tpu_async_collective_fusion_fuse_multiple_collectives": True,
        "xla_max_concurrent_async_all_gathers": 16,
    },
}
"""What is different where weights travel, too: on GPUs with fewer at a time, keys and values are gathered far too early.

On TPUs kernels of products carry the gathers of weights, by themselves one at a time, and what does not find one in time is
gathered while nothing else is done; with these, less of it. What is under way is held in full.
"""


def options_for(platform: str, *, shard_weights: bool = False) -> dict[str, Any]:
    """This project's options for XLA on one of JAX's platforms."""
    return {**OPTIONS.get(platform, {}), **(SHARDED.get(platform, {}) if shard_weights else {})}


Params = tuple[jax.Array, ...]
"""The leaves of a module, as a compiled program takes them: quick to hand over, whatever the module's depth."""


class Programs:
    """Compiles `function(static, params, *arguments)` once for each static value and each shape of the arguments.

    And for each precision of products that a caller has set (`jax.default_matmul_precision`).

    platform: JAX's name for the devices'. options: a user's for XLA, before those of `options_for`. shard_weights: whether
    parameters are gathered in the programs.
    seconds: of tracing and compiling so far, which several programs may have spent at the same time. waited: seconds that
    calls stood still for it.
    """

    def __init__(self, platform: str, options: Mapping[str, Any] | None = None, *, shard_weights: bool = False):
        _check_jit()
        if not isinstance(options, Mapping | None):
            raise DistriError(f"compiler_options is {options!r:.60}; give a dict of XLA's options")
        self.platform = platform
        self.ours, self.options = options_for(platform, shard_weights=shard_weights), dict(options or {})
        self.seconds = self.waited = 0.0
        self._compiled: dict[Hashable, Future[jax.stages.Compiled]] = {}
        self._fit: set[Hashable] = set()
        # several processes have to compile in one order, for XLA may have them try out kernels together
        self._workers = ThreadPoolExecutor(1 if jax.process_count() > 1 else 4, "compile")

    @property
    def count(self) -> int:
        """How many programs there are."""
        return len(self._compiled)

    def prepare(
        self, function: Callable, static: Hashable, params: Params, *arguments: Any, donate: tuple[int, ...] = ()
    ) -> tuple[Hashable, Future[jax.stages.Compiled]]:
        """Begins to compile a program that will be called, while something else goes on; returns its key, and what will be it.

        Arguments may be shapes with shardings. donate: which of `arguments` (from 0) the program may overwrite.
        """
        _check_jit()
        leaves, structure = jax.tree.flatten(arguments)
        taken = tuple((leaf.shape, leaf.dtype, _cuts(leaf.sharding)) for leaf in leaves)
        precision = jax.config.jax_default_matmul_precision  # of this thread; the workers have their own
        key = (function, static, structure, taken, precision)
        if (begun := self._compiled.get(key)) is None:
            shapes = jax.tree.map(_shape, (params, *arguments))
            begun = self._compiled[key] = self._workers.submit(
                self._compile, function, static, shapes, donate, precision
            )
        return key, begun

    def __call__(
        self, function: Callable, static: Hashable, params: Params, *arguments: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """Runs the program. donate: which of `arguments` (from 0) it may overwrite."""
        key, begun = self.prepare(function, static, params, *arguments, donate=donate)
        start = time.perf_counter()
        try:
            program = begun.result()
        except Exception:
            self._compiled.pop(key, None)  # it is none, and a later call may try again
            raise
        if key not in self._fit:
            self.waited += time.perf_counter() - start
            jax.block_until_ready(arguments)  # what made them has given back its memory
            check_memory(program, jax.tree.leaves(arguments)[0].sharding.mesh.local_devices[0])
            self._fit.add(key)
        result = program(params, *arguments)
        # virtual CPU devices share one pool of threads: with a second program in it, the collectives of the first may wait
        # for ever for a device that gets no thread
        return jax.block_until_ready(result) if self.platform == "cpu" else result

    def abandon(self) -> None:
        """Gives up what was prepared and is not begun."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _compile(
        self, function: Callable, static: Hashable, shapes: tuple, donate: tuple[int, ...], precision: str | None
    ) -> jax.stages.Compiled:
        start = time.perf_counter()
        with jax.default_matmul_precision(precision):
            lowered = trace(function, static, *shapes, donate=donate).lower()
        program = compiled(lowered, self.ours, self.options)
        self.seconds += time.perf_counter() - start
        return program


def _check_jit() -> None:
    if jax.config.jax_disable_jit:
        raise DistriError("jax_disable_jit is set, and programs are compiled ahead here; unset it")


def _shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def trace(
    function: Callable, static: Hashable, params: Params, *arguments: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Traced:
    """`function(static, params, *arguments)`, of arrays or shapes. donate: which of `arguments` it may overwrite."""
    jitted = jax.jit(function, static_argnums=0, donate_argnums=tuple(2 + index for index in donate))
    return jitted.trace(static, params, *arguments)


def compiled(lowered: jax.stages.Lowered, ours: Mapping[str, Any], options: Mapping[str, Any]) -> jax.stages.Compiled:
    """The program, compiled with this project's options (`options_for`) and, before them, a user's.

    An option of ours that this version of XLA does not have is left out, with a DistriWarning. Raises DistriError for a
    user's that XLA does not have, or with a value that it does not take.
    """
    chosen = {**ours, **options}
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
            told = f"this XLA has no option {refused}; programs may be slower than they could be"
            warn(told)
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
