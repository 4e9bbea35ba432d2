"""How much faster does one device get when it has a part of the picture? The computing side of scaling, measured on ONE device.

    python benchmarks/shard.py --image-size 1024 --parts 1 2 4 8             # SDXL's UNet, random weights
    python benchmarks/shard.py --model FOLDER --image-size 256

Runs displaced steps of one device out of n on a single device, each on what the one before left. Its collectives are replaced
by local stand-ins that yield arrays of the same shapes: a gather copies the own part n times, a permute gives back what it got.
So these are no pictures and no times of n devices: nothing travels, and nobody waits. What remains is what n devices could gain
at best, t(1) / t(n). A line of JSON for each n. All programs are compiled first, several at a time; what an earlier run left in
JAX's compilation cache is only read, and its compile_s is that (JAX_ENABLE_COMPILATION_CACHE=false compiles anew).
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
from distrijax.cli.options import (
    Parser,
    check_positive,
    device_kind,
    find_dtype,
    keep_compiled_programs,
    plain_errors,
)
from distrijax.models.unet_config import SDXL_BASE
from distrijax.parallel import collectives, exchange
from distrijax.parallel.layout import Layout, check_sizes
from distrijax.parallel.mesh import PATCH, MeshPlan
from distrijax.parallel.programs import compiled, options_for, trace
from distrijax.pipelines.loading import find_folder, read_configs
from distrijax.plan.traffic import main_step
from distrijax.sampling import denoise
from distrijax.sampling.noise import image_keys
from distrijax.sampling.shapes import StepProgram
from distrijax.validate import positive
from distrijax.weights.dtypes import DTYPES

VAE_SCALE = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; raises SystemExit with a code other than 0, after one line on stderr, for wrong input."""
    arguments = parse(argv)
    with plain_errors():
        benchmark(arguments)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", help="folder in the diffusers layout or hub id, for its UNet's shape (default: SDXL's)")
    add("--image-size", type=int, nargs="+", default=[1024], metavar=("H", "W"), help="pixels (default: 1024)")
    add("--parts", type=int, nargs="+", default=[1, 2, 4, 8], help="how many devices to stand for (default: 1 2 4 8)")
    add("--split-batch", action="store_true", help="each half of the devices has one branch of the guidance")
    add("--sync-mode", choices=tuple(mode.value for mode in SyncMode), default=SyncMode.CORRECTED_ASYNC_GN.value)
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on accelerators, float32 on CPUs)")
    parser.add_values("--compiler-option", "of XLA, instead of this project's choice")
    add(
        "--steps", type=int, default=5, help="that are timed together, one begun after the other (default: %(default)s)"
    )
    add("--warmup-times", type=int, default=2, help="such runs before any is timed (default: %(default)s)")
    add("--test-times", type=int, default=10, help="timed runs, of which the median counts (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.image_size = parser.size(arguments.image_size)
    return arguments


def benchmark(arguments: argparse.Namespace) -> None:
    """Measures for every number of parts; raises DistriError for flags that cannot be."""
    check_positive(arguments, "warmup_times", "test_times")
    height, width = arguments.image_size
    check_sizes(height=height, width=width, vae_scale=VAE_SCALE)
    keep_compiled_programs()
    unet, scheduler = SDXL_BASE, load_scheduler({"_class_name": "DDIMScheduler"})
    if arguments.model:
        unet = read_configs(find_folder(arguments.model, weights=False)).unet
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


def timed(compiling: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the seconds it took."""
    start = time.perf_counter()
    return compiling(), time.perf_counter() - start


def time_steps(program: jax.stages.Compiled, step: StepProgram, arguments: argparse.Namespace) -> float:
    """Median seconds of one device's part of a step."""
    params, inputs, *carry, constants = filled(part_of(step))
    seconds = []
    for _ in range(arguments.warmup_times + arguments.test_times):
        start = time.perf_counter()
        for _ in range(arguments.steps):
            result = program(params, inputs, *carry, constants)
            carry = result if step.stale else [result]
        jax.block_until_ready(carry)
        seconds.append((time.perf_counter() - start) / arguments.steps)
    return statistics.median(seconds[arguments.warmup_times :])


def compile_part(step: StepProgram, options: Mapping[str, Any]) -> Callable[[], jax.stages.Compiled]:
    """What compiles one device's part of a step, without collectives, with a user's options; it is traced by then."""
    layout = OnePart(**{**vars(step.loop.layout), "mesh": alone()}, parts=step.loop.layout.patches)
    loop = dataclasses.replace(step.loop, layout=layout)
    with stand_ins(step.loop.layout.mesh.shape[PATCH]):
        lowered = trace(step.function, loop, *part_of(step), donate=step.donate).lower()
    return partial(compiled, lowered, options_for(jax.devices()[0].platform), options)


def alone() -> Mesh:
    """The mesh of one device."""
    return MeshPlan(1, 1, 1).build(jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class OnePart(Layout):
    """The layout of one device, which has one of so many parts of the rows."""

    parts: int = 1

    @property
    def patches(self) -> int:
        return self.parts


def part_of(step: StepProgram) -> tuple:
    """What one device's part of a step takes: shapes, and the constants of the step."""
    layout = step.loop.layout
    specs = denoise.specs_of(step.loop, stale=bool(step.stale))
    here = NamedSharding(alone(), P())

    def part(leaf: Any, spec: P) -> Any:
        if isinstance(leaf, np.ndarray):  # a constant
            return leaf
        shape = NamedSharding(layout.mesh, spec).shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=here)

    def parts(spec: P, leaves: Any) -> Any:
        return jax.tree.map(lambda leaf: part(leaf, spec), leaves)

    return jax.tree.map(parts, specs, (step.params, *step.arguments), is_leaf=lambda spec: isinstance(spec, P))


def filled(shapes: Any) -> Any:
    """Small random numbers; the same ones again and again, for drawing those of a large model would take long."""
    drawn = np.abs(0.02 * np.random.default_rng(0).standard_normal(999_983, np.float32))

    def fill(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(image_keys(jnp.zeros((leaf.shape[0], 3), jnp.uint32)), leaf.sharding)
        if isinstance(leaf, np.ndarray):
            return jax.device_put(leaf, NamedSharding(alone(), P()))
        return jax.device_put(np.resize(drawn.astype(leaf.dtype), leaf.shape), leaf.sharding)

    return jax.tree.map(fill, shapes)


@contextmanager
def stand_ins(parts: int) -> Iterator[None]:
    """Within, what `distrijax.parallel.collectives` asks of other devices is answered from the own values."""

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
