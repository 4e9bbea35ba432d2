"""Compute time of one device's part of a step, measured on ONE device: an upper bound of the speed-up on n devices.

    python benchmarks/shard.py --image-size 1024 --parts 1 2 4 8             # SDXL's UNet, random weights
    python benchmarks/shard.py --model FOLDER --image-size 256

The script runs displaced steps of one device out of n on a single device, each on the results of the previous one. Its
collectives are replaced by local stand-ins that return arrays of the same shapes: a gather copies the device's own part n
times, a permute returns its input. The results are therefore neither images nor times of n devices: nothing is transferred,
and no device waits. The ratio t(1) / t(n) is the most that n devices could gain. The script prints a line of JSON for each n.
All programs are compiled first, several at a time; for a program in JAX's compilation cache, compile_s is the time to read it
(JAX_ENABLE_COMPILATION_CACHE=false compiles anew).
"""

from __future__ import annotations

from distrijax.cli.start import begin

if __name__ == "__main__":
    begin()  # before imports that take seconds

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrijax import DistriConfig, SyncMode, load_scheduler, plan_mesh
from distrijax.cli.compile_cache import keep_compiled_programs
from distrijax.cli.options import (
    Parser,
    check_positive,
    device_kind,
    find_dtype,
    plain_errors,
)
from distrijax.convert.sources import open_checkpoint
from distrijax.models.unet_config import SDXL_BASE
from distrijax.parallel import collectives, exchange
from distrijax.parallel.layout import Layout, check_sizes
from distrijax.parallel.mesh import PATCH, MeshPlan
from distrijax.parallel.programs import compiled, options_for, trace
from distrijax.parallel.stages import Described
from distrijax.pipelines.loading import read_configs
from distrijax.plan.traffic import main_step
from distrijax.sampling.noise import image_keys
from distrijax.sampling.steps import StepInputs
from distrijax.validate import positive
from distrijax.weights.dtypes import DTYPES

VAE_SCALE = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Flags; those of the process unless given.

    Raises:
        SystemExit: For wrong input, with a code other than 0 and one line on stderr.
    """
    arguments = parse(argv)
    with plain_errors():
        benchmark(arguments)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", help="folder in the diffusers layout or hub id, whose UNet's shapes are used (default: SDXL's)")
    add("--image-size", type=int, nargs="+", default=[1024], metavar=("H", "W"), help="pixels (default: 1024)")
    add("--parts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of devices to simulate (default: 1 2 4 8)")
    add("--split-batch", action="store_true", help="run each guidance branch on half of the devices (CFG split)")
    add("--sync-mode", choices=tuple(mode.value for mode in SyncMode), default=SyncMode.CORRECTED_ASYNC_GN.value)
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on accelerators, float32 on CPUs)")
    parser.add_values("--compiler-option", "an XLA option that replaces this project's")
    add("--steps", type=int, default=5, help="consecutive steps of one timed run (default: %(default)s)")
    add("--warmup-times", type=int, default=2, help="untimed runs first (default: %(default)s)")
    add("--test-times", type=int, default=10, help="timed runs; the median is reported (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.image_size = parser.size(arguments.image_size)
    return arguments


def benchmark(arguments: argparse.Namespace) -> None:
    """Measures every number of parts; raises DistriError for invalid flags."""
    check_positive(arguments, "warmup_times", "test_times")
    height, width = arguments.image_size
    check_sizes(height=height, width=width, vae_scale=VAE_SCALE)
    keep_compiled_programs()
    unet, scheduler = SDXL_BASE, load_scheduler({"_class_name": "DDIMScheduler"})
    if arguments.model:
        unet = read_configs(open_checkpoint(arguments.model, weights=False)).unet
    dtype = find_dtype(arguments.dtype)
    config = DistriConfig(sync_mode=arguments.sync_mode, split_batch=arguments.split_batch)
    latent = (height // VAE_SCALE, width // VAE_SCALE)
    meshes = [plan_mesh(config, positive(parts, "--parts"), branches=unet.branches) for parts in arguments.parts]
    settings = {"latent": latent, "dtype": dtype, "platform": jax.devices()[0].platform}
    steps = [main_step(config, unet, scheduler, mesh, **settings) for mesh in meshes]
    with ThreadPoolExecutor(4) as workers:
        compiling = [workers.submit(timed, compile_part(step, arguments.compiler_option)) for step in steps]
        programs = [each.result() for each in compiling]
    whole = None
    for parts, mesh, step, (program, compile_s) in zip(arguments.parts, meshes, steps, programs, strict=True):
        seconds = time_steps(program, step, arguments)
        whole = whole or seconds
        row = {
            "part_of": parts,
            "mesh": str(mesh),
            "device": device_kind(),
            "model": arguments.model or "SDXL, random",
            "image_size": [height, width],
            "sync_mode": config.sync_mode.value,
            "dtype": dtype.name,
            "compiler_options": arguments.compiler_option,
            "jax": jax.__version__,
            "compile_s": round(compile_s, 2),
            "step_s": round(seconds, 6),
            f"of_{arguments.parts[0]}": round(whole / seconds, 3),
            "collectives": "local stand-ins",
        }
        print(json.dumps(row), flush=True)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call, and the seconds it took."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def time_steps(program: jax.stages.Compiled, step: Described, arguments: argparse.Namespace) -> float:
    """Median seconds of one device's part of a step."""
    *shapes, _ = part_of(step)
    params, inputs, *carry = filled(shapes)
    table, _ = step.static.loop.scheduler.schedule(2)
    constants = jax.device_put((StepInputs.of(table).part(0, 1),), NamedSharding(alone(), P()))
    seconds = []
    for _ in range(arguments.warmup_times + arguments.test_times):
        start = time.perf_counter()
        for _ in range(arguments.steps):
            carry = program(params, inputs, *carry, constants)
        jax.block_until_ready(carry)
        seconds.append((time.perf_counter() - start) / arguments.steps)
    return statistics.median(seconds[arguments.warmup_times :])


def compile_part(step: Described, options: Mapping[str, Any]) -> Callable[[], jax.stages.Compiled]:
    """Traces one device's part of a step, without collectives; returns a function that compiles it with a user's options."""
    whole = step.static.loop.layout
    layout = OnePart(**{**vars(whole), "mesh": alone()}, parts=whole.patches)
    static = step.static._replace(loop=dataclasses.replace(step.static.loop, layout=layout))
    with stand_ins(whole.mesh.shape[PATCH]):
        lowered = trace(step.stage, static, *part_of(step)).lower()
    return partial(compiled, lowered, options_for(jax.devices()[0].platform), options)


def alone() -> Mesh:
    """The mesh of one device."""
    return MeshPlan(1, 1, 1).build(jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class OnePart(Layout):
    """The layout of a single device that holds one of `parts` bands."""

    parts: int = 1

    @property
    def patches(self) -> int:
        return self.parts


def part_of(step: Described) -> tuple:
    """The shapes of one device's part of a step's parameters and arguments."""
    here = NamedSharding(alone(), P())

    def part(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype, sharding=here)

    return jax.tree.map(part, (step.params, *step.arguments))


def filled(shapes: Any) -> Any:
    """Arrays of small random numbers, which repeat: drawing those of a large model would take long."""
    drawn = np.abs(0.02 * np.random.default_rng(0).standard_normal(999_983, np.float32))

    def fill(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(image_keys(jnp.zeros((leaf.shape[0], 3), jnp.uint32)), leaf.sharding)
        return jax.device_put(np.resize(drawn.astype(leaf.dtype), leaf.shape), leaf.sharding)

    return jax.tree.map(fill, shapes)


@contextmanager
def stand_ins(parts: int) -> Iterator[None]:
    """Replaces the collectives of `distrijax.parallel.collectives` by local stand-ins within a `with` block."""

    def size(axis: Any) -> int:
        axes = axis if isinstance(axis, tuple) else (axis,)
        return parts if "patch" in axes else lax.axis_size(axis)

    def all_gather(x: jax.Array, axis_name: Any, *, axis: int = 0, tiled: bool = False) -> jax.Array:
        copies = jnp.broadcast_to(x[None], (size(axis_name), *x.shape))
        return jnp.concatenate(list(copies), axis) if tiled else copies

    def ppermute(x: jax.Array, axis_name: Any, pairs: Any) -> jax.Array:
        return x

    names = {name: getattr(lax, name) for name in dir(lax) if not name.startswith("_")}
    replaced = SimpleNamespace(**{**names, "all_gather": all_gather, "ppermute": ppermute, "axis_size": size})
    with mock.patch.object(collectives, "lax", replaced), mock.patch.object(exchange, "lax", replaced):
        yield


if __name__ == "__main__":
    main()
