"""Compiled programs, kept by what they depend on, so that compile time is known apart from run time."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import jax
from jax.sharding import NamedSharding

from distrijax.errors import DistriError, warn
from distrijax.parallel.threads import compilers, wait
from distrijax.validate import positive

logger = logging.getLogger("distrijax")

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


Params = tuple[jax.Array | jax.ShapeDtypeStruct, ...]
"""The leaves of a module, or their shapes, as a compiled program takes them: quick to hand over, whatever the module's depth."""


MOST = 64
"""How many programs a pipeline keeps unless told otherwise.

Each holds some 300 memory maps on CPUs, of which Linux allows a process 65,530, and its code on accelerators. A call runs about
7 programs, of which another image size needs 5 anew.
"""


class Programs:
    """Compiles `function(static, params, *arguments)` once for each static value and each shape of the arguments.

    And for each precision of products that a caller has set (`jax.default_matmul_precision`). Several threads may call at once;
    their programs run one after the other.

    Args:
        platform: JAX's name for the devices'.
        options: a user's for XLA, before those of `options_for`.
        shard_weights: whether parameters are gathered in the programs.
        most: how many programs are kept. Those that have not been used for longest give way to new ones, unless they are being
            compiled or run.

    Attributes:
        seconds: of tracing and compiling so far, which several programs may have spent at the same time.
        waited: seconds that calls stood still for it.
    """

    def __init__(
        self,
        platform: str,
        options: Mapping[str, Any] | None = None,
        *,
        shard_weights: bool = False,
        most: int = MOST,
    ):
        _check_jit()
        if not isinstance(options, Mapping | None):
            raise DistriError(f"compiler_options is {options!r:.60}; give a dict of XLA's options")
        self.platform = platform
        self.ours, self.options = options_for(platform, shard_weights=shard_weights), dict(options or {})
        self.most = positive(most, "max_programs")
        self.seconds = self.waited = 0.0
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[Hashable, Future[jax.stages.Compiled]] = collections.OrderedDict()
        self._running: collections.Counter[Hashable] = collections.Counter()
        self._fit: set[Hashable] = set()
        # several processes have to compile in one order, for XLA may have them try out kernels together
        self._compilers = compilers(1 if jax.process_count() > 1 else 4)

    @property
    def count(self) -> int:
        """How many programs there are."""
        return len(self._compiled)

    def prepare(
        self,
        function: Callable,
        static: Hashable,
        params: Params,
        *arguments: Any,
        donate: tuple[int, ...] = (),
        traced: jax.stages.Traced | None = None,
    ) -> tuple[Hashable, Future[jax.stages.Compiled]]:
        """Begins to compile a program that will be called, while something else goes on; returns its key, and what will be it.

        Arguments may be shapes with shardings. donate: which of `arguments` (from 0) the program may overwrite. traced: what
        `trace` has made of all this, if it has been called.
        """
        _check_jit()
        leaves, structure = jax.tree.flatten(arguments)
        taken = tuple((leaf.shape, leaf.dtype, _cuts(leaf.sharding)) for leaf in leaves)
        precision = jax.config.jax_default_matmul_precision  # of this thread; the workers have their own
        key = (function, static, structure, taken, donate, precision)
        with self._lock:
            if (begun := self._compiled.get(key)) is None:
                shapes = jax.tree.map(_shape, (params, *arguments))
                begun = self._compiled[key] = self._compilers.submit(
                    self._compile, function, static, shapes, donate, precision, traced
                )
            self._compiled.move_to_end(key)
            self._evict(key)
        return key, begun

    def __call__(
        self, function: Callable, static: Hashable, params: Params, *arguments: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """Runs the program. donate: which of `arguments` (from 0) it may overwrite."""
        key, begun = self.prepare(function, static, params, *arguments, donate=donate)
        with self._in_use(key):
            start = time.perf_counter()
            try:
                program = begun.result()
            except Exception:
                self._drop(key, begun)  # it is none, and a later call may try again
                raise
            if key not in self._fit:
                self._add(waited=time.perf_counter() - start)
                wait(arguments)  # what made them has given back its memory
                check_memory(program, jax.tree.leaves(arguments)[0].sharding.mesh.local_devices[0])
                self._fit.add(key)
            return _launches(program, params, *arguments, alone=self.platform == "cpu")

    def abandon(self) -> None:
        """Gives up what was prepared and is not begun."""
        with self._lock:
            programs = list(self._compiled.items())
        for key, begun in programs:
            if begun.cancel():
                self._drop(key, begun)

    def _compile(
        self,
        function: Callable,
        static: Hashable,
        shapes: tuple,
        donate: tuple[int, ...],
        precision: str | None,
        traced: jax.stages.Traced | None,
    ) -> jax.stages.Compiled:
        start = time.perf_counter()
        with jax.default_matmul_precision(precision):
            lowered = (traced or trace(function, static, *shapes, donate=donate)).lower()
        program = compiled(lowered, self.ours, self.options)
        seconds = time.perf_counter() - start
        self._add(seconds=seconds)
        logger.info("compiled %s in %.1f s", function.__name__, seconds)
        return program

    def _add(self, *, seconds: float = 0, waited: float = 0) -> None:
        with self._lock:
            self.seconds += seconds
            self.waited += waited

    @contextlib.contextmanager
    def _in_use(self, key: Hashable) -> Iterator[None]:
        with self._lock:
            self._running[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[key] -= 1
                self._running += collections.Counter()  # drops what is zero

    def _evict(self, newest: Hashable) -> None:
        """Drops the programs above `most` that have not been used for longest."""
        if self.count <= self.most:
            return
        idle = [
            key for key, begun in self._compiled.items() if begun.done() and key != newest and key not in self._running
        ]
        for key in idle[: self.count - self.most]:
            logger.info("evicted %s: more than %d programs", key[0].__name__, self.most)
            del self._compiled[key]
            self._fit.discard(key)

    def _drop(self, key: Hashable, begun: Future) -> None:
        with self._lock:
            if self._compiled.get(key) is begun:
                del self._compiled[key]


class _Launches:
    """Has programs begin in one order on all devices, whichever threads and pipelines call them.

    Otherwise each of two programs could wait in a collective for a device that has begun with the other. Virtual CPU devices
    share one pool of threads: with a second program in it, the collectives of the first may wait for ever for a device that
    gets no thread; so there a program ends before the next begins.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._left: Any = None

    def __call__(self, program: jax.stages.Compiled, *arguments: Any, alone: bool) -> Any:
        """The program's result. alone: whether to wait for it."""
        with self._lock:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # which nobody waits for any more
                wait(self._left)
            self._left = result = program(*arguments)
            if alone:
                wait(result)  # after an interrupt the devices go on, and the next program waits for them
            self._left = None
            return result


_launches = _Launches()


def _check_jit() -> None:
    if jax.config.jax_disable_jit:
        raise DistriError("jax_disable_jit is set, and programs are compiled ahead here; unset it")


def _shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def trace(
    function: Callable, static: Hashable, params: Params, *arguments: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Traced:
    """`function(static, params, *arguments)`, of arrays or shapes. donate: which of `arguments` it may overwrite.

    JAX's caches keep what comes of a function, compiled programs included, for as long as the function lives. This one lives as
    long as the result.
    """
    jitted = jax.jit(functools.partial(function, static), donate_argnums=tuple(1 + index for index in donate))
    return jitted.trace(params, *arguments)


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
