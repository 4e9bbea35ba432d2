"""How much faster does one device get when it has a part of the picture? The computing side of scaling, measured on ONE device.

    python benchmarks/shard.py --image-size 1024 --parts 1 2 4 8             # SDXL's UNet, random weights
    python benchmarks/shard.py --model FOLDER --image-size 256

Runs the displaced step of one device out of n on a single device. Its collectives are replaced by local stand-ins that yield
arrays of the same shapes: a gather copies the own part n times, a permute gives back what it got. So these are no pictures and
no times of n devices: nothing travels, and nobody waits. What remains is what n devices could gain at best, t(1) / t(n). A line
of JSON for each n.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
from command_line import Parser, check_positive, device_kind, find_dtype, keep_compiled_programs, plain_errors
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrijax import DistriConfig, SyncMode, denoise, exchange, load_scheduler, plan_mesh
from distrijax.config import positive
from distrijax.denoise import Layout
from distrijax.loading import DTYPES, find_folder, read_configs
from distrijax.mesh import PATCH, MeshPlan, check_sizes
from distrijax.plan import step_of
from distrijax.programs import compiled, options_for, trace
from distrijax.shapes import Step
from distrijax.unet import SDXL_BASE

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
    add("--warmup-times", type=int, default=3, help="steps before any is timed (default: %(default)s)")
    add("--test-times", type=int, default=20, help="timed steps, of which the median counts (default: %(default)s)")
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
        unet = read_configs(find_folder(arguments.model, variant=None, revision=None, token=None)).unet
    dtype = find_dtype(arguments.dtype)
    whole = None
    for parts in arguments.parts:
        config = DistriConfig(sync_mode=arguments.sync_mode, split_batch=arguments.split_batch)
        mesh = plan_mesh(config, positive(parts, "--parts"), branches=unet.branches)
        latent = (height // VAE_SCALE, width // VAE_SCALE)
        seconds, compiling = time_step(
            step_of(config, unet, scheduler, mesh, latent=latent, dtype=dtype),
            arguments.warmup_times,
            arguments.test_times,
        )
        whole = whole or seconds
        row = {
            "part_of": parts,
            "mesh": str(mesh),
            "device": device_kind(),
            "model": arguments.model or "SDXL, random",
            "image_size": [height, width],
            "sync_mode": config.sync_mode.value,
            "dtype": dtype.name,
            "jax": jax.__version__,
            "compile_s": round(compiling, 2),
            "step_s": round(seconds, 6),
            f"of_{arguments.parts[0]}": round(whole / seconds, 3),
            "collectives": "local stand-ins",
        }
        print(json.dumps(row), flush=True)


def time_step(step: Step, warm_up: int, times: int) -> tuple[float, float]:
    """Median seconds of one device's part of a step, and the seconds of compiling it."""
    start = time.perf_counter()
    program, arguments = compile_part(step)
    compiling = time.perf_counter() - start
    seconds = []
    for _ in range(warm_up + times):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:]), compiling


def compile_part(step: Step) -> tuple[jax.stages.Compiled, tuple]:
    """One device's part of a step, without collectives, and what it takes."""
    alone = MeshPlan(1, 1, 1).build(jax.devices()[:1])
    layout = OnePart(**{**vars(step.loop.layout), "mesh": alone}, parts=step.loop.layout.patches)
    loop = dataclasses.replace(step.loop, layout=layout)
    arguments = part_of(step, NamedSharding(alone, P()))
    with stand_ins(step.loop.layout.mesh.shape[PATCH]):
        lowered = trace(step.function, loop, *arguments).lower()
    return compiled(lowered, options_for(jax.devices()[0].platform), {}), arguments


@dataclasses.dataclass(frozen=True)
class OnePart(Layout):
    """The layout of one device, which has one of so many parts of the rows."""

    parts: int = 1

    @property
    def patches(self) -> int:
        return self.parts


def part_of(step: Step, place: NamedSharding) -> tuple:
    """Arguments of a step as one device has them: its part of every array, of random values."""
    layout = step.loop.layout
    specs = denoise.specs_of(step.loop, stale=bool(step.stale))
    random = np.random.default_rng(0)

    def value(leaf: Any, spec: P) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.split(jax.random.key(0), leaf.shape[0]), place)
        if isinstance(leaf, np.ndarray):  # the constants of the step
            return jax.device_put(leaf, place)
        shape = NamedSharding(layout.mesh, spec).shard_shape(leaf.shape)
        drawn = 0.02 * random.standard_normal(shape, np.float32)
        return jax.device_put(jnp.abs(drawn).astype(leaf.dtype), place)

    def values(spec: P, part: Any) -> Any:
        return jax.tree.map(lambda leaf: value(leaf, spec), part)

    arguments = (step.params, *step.arguments)
    return jax.tree.map(values, specs, arguments, is_leaf=lambda spec: isinstance(spec, P))


@contextmanager
def stand_ins(parts: int) -> Iterator[None]:
    """Within, what `distrijax.exchange` asks of other devices is answered from the own values."""

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
    with mock.patch.object(exchange, "lax", replaced):
        yield


if __name__ == "__main__":
    main()
