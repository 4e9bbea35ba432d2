"""Compiled programs, cached and compiled ahead of time, so that compile time and run time are known apart."""

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
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from distrijax.errors import InvalidArgument, OutOfMemory, warn
from distrijax.parallel.platform import tracing_for
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
"""XLA's options by JAX's name of the platform.

GPU:
    - Transfers overlap with compute only under the latency-hiding scheduler. Its analytical latency model regards small
      transfers over Hopper's links as not worth hiding, so it is off.
    - Three collectives may be in flight. With one, collectives that queue start too late; with many, more memory is held at once.
    - Only small all-gathers are combined. Otherwise XLA makes the first GroupNorm wait for the K/V of a much later layer.
    - Boundary rows are small; all of them travel in one permute, at 3840x3840 in two. Permuted one by one, some would be
      scheduled where no matmul hides them, in the place of the first GroupNorm's moments.
    - Matmuls run in cuBLAS, which fuses biases and residuals itself; Triton's GEMMs need other kernels around them.

TPU: displaced values arrive by collective permutes, which can overlap with any compute. libtpu keeps few of them in flight by
default; those that queue then run one after the other where nothing hides them.

CPU: YNNPACK fuses only reductions. Its convolutions of up to 64 channels run on one core, and Eigen's matmuls are faster.
"""

SHARDED: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_experimental_parallel_collective_overlap_limit": 8},
    "tpu": {
        "xla_tpu_async_collective_fusion_fuse_multiple_collectives": True,
        "xla_max_concurrent_async_all_gathers": 16,
    },
}
"""What is different if weights are sharded, and so gathered by the programs.

GPU: with fewer collectives in flight, keys and values are gathered far too early.

TPU: fusions of matmuls carry the all-gathers of weights, by default one at a time, and a gather that finds no matmul in time
blocks. These options reduce such gathers. All collectives in flight are held in full.
"""


def options_for(platform: str, *, shard_weights: bool = False) -> dict[str, Any]:
    """distrijax's default options for XLA.

    Args:
        platform: JAX's name of the platform; one without defaults gets no options.
        shard_weights: Whether parameters are sharded, and so gathered by the programs.
    """
    return {**OPTIONS.get(platform, {}), **(SHARDED.get(platform, {}) if shard_weights else {})}


Params = tuple[jax.Array | jax.ShapeDtypeStruct, ...]
"""A module's leaves, or their shapes, as a compiled program takes them; a flat tuple dispatches fast at any module depth."""


class Stage(NamedTuple):
    """A part of a call that runs as one program, `function(static, params, *arguments)`.

    Attributes:
        function: Traceable; `static` is hashable and says all that the program depends on besides shapes.
        results: The shardings of its result, of `static`: a tree in which one sharding stands for all leaves in its place. None if
            no other stage takes the result.
        donate: Indices of `arguments` whose memory the program may overwrite.
        same: Of `static` and the arguments: which arguments have the shapes of its results, one for each; None where only
            tracing tells the shapes.
    """

    function: Callable[..., Any]
    results: Callable[[Any], Any] | None = None
    donate: tuple[int, ...] = ()
    same: Callable[[Any], tuple[int, ...] | None] | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__


MAX_PROGRAMS = 64
"""Default limit of the programs that a pipeline keeps.

On CPUs each one holds some 300 memory maps, of which Linux allows a process 65,530; on accelerators it holds its code. A call
runs about 7 programs; another image size compiles 5 of them again.
"""


class Programs:
    """Compiles and runs stages.

    A program is compiled once for each stage, static value, shapes and shardings of the arguments, and the caller's
    `jax.default_matmul_precision` (`program_key`). Several threads may call at once; their programs run one after the other.

    Args:
        platform: JAX's name of the devices' platform.
        options: A user's options for XLA; they take precedence over `options_for`.
        shard_weights: Whether parameters are sharded, and so gathered by the programs.
        max_programs: Limit of the programs that are kept. The least recently used ones are evicted, except those that are being
            compiled or run.

    Attributes:
        compile_seconds: Time spent in tracing and compiling, summed over programs, which may have been compiled concurrently.
        blocked_seconds: Time for which calls waited for compilation.
    """

    def __init__(
        self,
        platform: str,
        options: Mapping[str, Any] | None = None,
        *,
        shard_weights: bool = False,
        max_programs: int = MAX_PROGRAMS,
    ):
        _check_jit()
        if not isinstance(options, Mapping | None):
            raise InvalidArgument(f"compiler_options is {options!r:.60}; give a dict of XLA's options")
        self.platform = platform
        self.defaults, self.options = options_for(platform, shard_weights=shard_weights), dict(options or {})
        self.max_programs = positive(max_programs, "max_programs")
        self.compile_seconds = self.blocked_seconds = 0.0
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[Hashable, Future[jax.stages.Compiled]] = collections.OrderedDict()
        self._running: collections.Counter[Hashable] = collections.Counter()
        self._memory_checked: set[Hashable] = set()
        self._results: dict[Hashable, Any] = {}
        # all processes must compile in the same order: XLA may autotune kernels across them
        self._compilers = compilers(1 if jax.process_count() > 1 else 4)

    @property
    def count(self) -> int:
        """Number of cached programs."""
        return len(self._compiled)

    def prepare(
        self,
        stage: Stage,
        static: Hashable,
        params: Any,
        *arguments: Any,
        traced: jax.stages.Traced | None = None,
    ) -> tuple[Hashable, Future[jax.stages.Compiled]]:
        """Starts to compile a program in the background.

        Args:
            stage: The stage to compile.
            static: Its static argument.
            params: The parameters of its models, arrays or shapes with shardings.
            *arguments: Its other arguments, arrays or shapes with shardings.
            traced: What `trace` returned for the same arguments, if it has been called.

        Returns:
            The program's key, and the future of the program.
        """
        _check_jit()
        key = program_key(stage, static, arguments)
        with self._lock:
            if (begun := self._compiled.get(key)) is None:
                shapes = jax.tree.map(_shape, (params, *arguments))
                precision = jax.config.jax_default_matmul_precision  # of this thread; the workers have their own
                begun = self._compiled[key] = self._compilers.submit(
                    self._compile, stage, static, shapes, precision, traced
                )
            self._compiled.move_to_end(key)
            self._evict(key)
        return key, begun

    def __call__(self, stage: Stage, static: Hashable, params: Any, *arguments: Any) -> Any:
        """Runs a program, compiled if it is not yet; the arguments are those of `prepare`, all of them arrays."""
        key, begun = self.prepare(stage, static, params, *arguments)
        with self._in_use(key):
            start = time.perf_counter()
            try:
                program = begun.result()
            except Exception:
                self._drop(key, begun)  # a later call may try again
                raise
            if key not in self._memory_checked:
                self._add_time(blocked=time.perf_counter() - start)
                wait(arguments)  # the programs that computed them have freed their memory
                check_memory(program, jax.tree.leaves(arguments)[0].sharding.mesh.local_devices[0])
                self._memory_checked.add(key)
            return _launches(program, params, *arguments, alone=self.platform == "cpu")

    def results(self, key: Hashable) -> Any:
        """What `keep_results` kept for a program, or None.

        Args:
            key: The program's.
        """
        return self._results.get(key)

    def keep_results(self, key: Hashable, shapes: Any) -> None:
        """Keeps the shapes of a program's results, for as long as the program is kept.

        Args:
            key: The program's.
            shapes: A tree of shapes.
        """
        with self._lock:
            if key in self._compiled:
                self._results[key] = shapes

    def cancel_pending(self) -> None:
        """Cancels the compilations that have not started."""
        with self._lock:
            programs = list(self._compiled.items())
        for key, begun in programs:
            if begun.cancel():
                self._drop(key, begun)

    def _compile(
        self,
        stage: Stage,
        static: Hashable,
        shapes: tuple,
        precision: str | None,
        traced: jax.stages.Traced | None,
    ) -> jax.stages.Compiled:
        start = time.perf_counter()
        with jax.default_matmul_precision(precision):
            lowered = (traced or trace(stage, static, *shapes)).lower()
        program = compiled(lowered, self.defaults, self.options)
        seconds = time.perf_counter() - start
        self._add_time(compiling=seconds)
        logger.info("compiled %s in %.1f s", stage.name, seconds)
        return program

    def _add_time(self, *, compiling: float = 0, blocked: float = 0) -> None:
        with self._lock:
            self.compile_seconds += compiling
            self.blocked_seconds += blocked

    @contextlib.contextmanager
    def _in_use(self, key: Hashable) -> Iterator[None]:
        with self._lock:
            self._running[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[key] -= 1
                self._running += collections.Counter()  # removes zero counts

    def _evict(self, newest: Hashable) -> None:
        """Drops the least recently used programs above `max_programs`."""
        if self.count <= self.max_programs:
            return
        idle = [
            key for key, begun in self._compiled.items() if begun.done() and key != newest and key not in self._running
        ]
        for key in idle[: self.count - self.max_programs]:
            logger.info("evicted %s: more than %d programs", key[0].name, self.max_programs)
            del self._compiled[key]
            self._memory_checked.discard(key)
            self._results.pop(key, None)

    def _drop(self, key: Hashable, begun: Future) -> None:
        with self._lock:
            if self._compiled.get(key) is begun:
                del self._compiled[key]
                self._results.pop(key, None)


class _Launches:
    """Launches programs in the same order on all devices, for all threads and pipelines of a process.

    Otherwise two programs could deadlock, each waiting in a collective for a device that runs the other. Virtual CPU devices
    share one thread pool: with a second program in it, a collective of the first may wait forever for a device that gets no
    thread. There a program ends before the next one starts.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._unfinished: Any = None

    def __call__(self, program: jax.stages.Compiled, *arguments: Any, alone: bool) -> Any:
        """Runs a program and returns its result, without waiting for it unless it is to run `alone`."""
        with self._lock:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # of an interrupted call
                wait(self._unfinished)
            self._unfinished = result = program(*arguments)
            if alone:
                wait(result)  # an interrupt does not stop the devices; the next launch waits for them
            self._unfinished = None
            return result


_launches = _Launches()


def _check_jit() -> None:
    if jax.config.jax_disable_jit:
        raise InvalidArgument("jax_disable_jit is set, and distrijax compiles programs ahead of time; unset it")


def check_eager() -> None:
    """Raises InvalidArgument inside a caller's `jax.jit`, where no program can be run."""
    if isinstance(jax.device_put(0.0), jax.core.Tracer):  # nothing is compiled for it
        raise InvalidArgument(
            "the pipeline was called inside jax.jit, and it runs compiled programs of its own; call it outside"
        )


def _shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def program_key(stage: Stage, static: Hashable, arguments: tuple) -> Hashable:
    """What a program is compiled once for.

    Args:
        stage: The stage.
        static: Its static argument; it determines the shapes of the parameters.
        arguments: Its other arguments, arrays or shapes with shardings.
    """
    leaves, structure = jax.tree.flatten(arguments)
    taken = tuple((leaf.shape, leaf.dtype, _canonical_spec(leaf.sharding)) for leaf in leaves)
    return stage, static, structure, taken, jax.config.jax_default_matmul_precision


def trace(stage: Stage, static: Hashable, params: Any, *arguments: Any) -> jax.stages.Traced:
    """Traces a stage, for the platform of the devices on which the arguments are.

    JAX's caches keep what was made from a function, compiled programs included, as long as the function lives. The function
    that is traced here lives as long as the result.

    Args:
        stage: The stage to trace.
        static: Its static argument.
        params: The parameters of its models, arrays or shapes with shardings.
        *arguments: Its other arguments, arrays or shapes with shardings.
    """
    donated = tuple(1 + index for index in stage.donate)
    jitted = jax.jit(functools.partial(stage.function, static), donate_argnums=donated)
    mesh = jax.tree.leaves((params, arguments))[0].sharding.mesh
    with tracing_for(mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None):
        return jitted.trace(params, *arguments)


def compiled(
    lowered: jax.stages.Lowered, defaults: Mapping[str, Any], options: Mapping[str, Any]
) -> jax.stages.Compiled:
    """Compiles a program.

    Args:
        lowered: The program.
        defaults: Options for XLA, such as those of `options_for`. One that this version of XLA does not have is left out, with a
            DistriWarning.
        options: A user's options, which take precedence.

    Raises:
        InvalidArgument: For a user's option that XLA does not have, or whose value it refuses.
    """
    chosen = {**defaults, **options}
    while True:
        try:
            return lowered.compile(compiler_options=chosen)
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            refused = next((name for name in chosen if re.search(rf"\b{re.escape(name)}\b", message)), None)
            if "INVALID_ARGUMENT" not in message or refused is None:
                raise
            if refused in options:
                raise InvalidArgument(
                    f"XLA refuses a compiler option ({message}); leave it out or correct it"
                ) from None
            warn(f"this XLA has no option {refused}; programs may be slower than they could be")
            del chosen[refused]


def check_memory(program: jax.stages.Compiled, device: jax.Device) -> None:
    """Checks that a program fits into a device's free memory; does nothing where the platform reports no limit.

    Args:
        program: A program whose arguments are on the device already.
        device: The device.

    Raises:
        OutOfMemory: For a program that needs more memory than is free.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return
    analysis = program.memory_analysis()
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    used, limit = stats["bytes_in_use"], stats["bytes_limit"]
    if used + needed > limit:
        raise OutOfMemory(
            f"the program needs {needed / 1e9:.3g} GB beside the {used / 1e9:.3g} GB in use, and a device has "
            f"{limit / 1e9:.3g} GB; use more devices, a smaller size or bfloat16"
        )


@functools.cache
def _canonical_spec(sharding: NamedSharding) -> Hashable:
    """A sharding without the mesh axes of size 1, which JAX may name or not; equal keys mean equal placement."""
    parts = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    spec = [tuple(axis for axis in axes if axis and sharding.mesh.shape[axis] > 1) for axes in parts]
    while spec and not spec[-1]:
        spec.pop()
    return sharding.mesh, tuple(spec)
