"""Latency of one image on one or more devices.

    python benchmarks/latency.py --devices 1 2 4 8 --model MODEL --image-size 1024 --output latency.jsonl --plot speed-up.png

The protocol is that of DistriFusion's script: warm-up calls, then timed calls, of which the slowest and the fastest are left
out. Reported are compile time; the denoising loop alone (UNet and scheduler, as in the paper); end to end, with text encoders
and decoder; and the peak memory of a device. The script prints a line of JSON for each number of devices, the most devices
first. Virtual CPU devices share the machine's cores: their figures show the overhead of more devices, not a speed-up.

compile_s     tracing and compiling; programs in JAX's compilation cache are read in far less time
              (JAX_ENABLE_COMPILATION_CACHE=false compiles anew)
peak_bytes    null where the platform does not report it, and where no device used more than in an earlier measurement:
              devices count for the whole process, so the most devices, which need the least of each, come first
"""

from __future__ import annotations

from distrijax.cli.start import begin

if __name__ == "__main__":
    begin(several=True)  # before imports that take seconds

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from distrijax import SCHEDULERS, DistriError, load_pipeline
from distrijax.atomic_write import atomic_write
from distrijax.cli.compile_cache import keep_compiled_programs
from distrijax.cli.generate import PROMPT
from distrijax.cli.multiprocess import add_process_flags, fail_together, join
from distrijax.cli.options import (
    Parser,
    add_model_flags,
    check_positive,
    device_kind,
    find_devices,
    find_dtype,
    json_lines,
    open_model,
    plain_errors,
)
from distrijax.flags import add_config_flags, config_of, settings_of
from distrijax.parallel.processes import is_main_process
from distrijax.validate import check_file, positive
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.dtypes import DTYPES


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Flags; those of the process unless given.

    Raises:
        SystemExit: For wrong input, with a code other than 0 and one line on stderr.
    """
    arguments = parse(argv)
    with fail_together(), plain_errors():
        positive(min(arguments.devices), "--devices")
        join(arguments, max(arguments.devices))
        benchmark(arguments)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--devices",
        type=int,
        nargs="+",
        default=[1],
        help="numbers of devices, which are compared (default: 1)",
    )
    add_model_flags(parser)
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on accelerators, float32 on CPUs)")
    add("--image-size", type=int, nargs="+", metavar=("H", "W"), help="pixels (default: the model's)")
    add("--num-inference-steps", type=int, default=50, help="(default: %(default)s)")
    add("--guidance-scale", type=float, default=5.0, help="(default: %(default)s)")
    add("--scheduler", choices=tuple(SCHEDULERS), default="ddim", help="(default: %(default)s)")
    add_config_flags(parser)
    add("--chunk-size", type=int, help="denoising steps of one program (default: all, the loop is one program)")
    add("--warmup-times", type=int, default=5, help="untimed calls first (default: %(default)s)")
    add("--test-times", type=int, default=20, help="timed calls (default: %(default)s)")
    add(
        "--ignore-ratio",
        type=float,
        default=0.2,
        help="share of them left out, half at each end (default: %(default)s)",
    )
    add_process_flags(parser)
    add("--output", type=Path, metavar="FILE", help="append the lines of JSON to a file")
    add("--plot", type=Path, metavar="FILE", help="plot of the speed-up over devices (PNG; extra `eval`)")
    arguments = parser.parse_args(argv)
    arguments.image_size = parser.size(arguments.image_size)
    return arguments


def benchmark(arguments: argparse.Namespace) -> None:
    """Measures every number of devices; raises DistriError for invalid flags."""
    check_positive(arguments, "warmup_times", "test_times")
    if not 0 <= arguments.ignore_ratio < 1:
        raise DistriError(f"--ignore-ratio is {arguments.ignore_ratio}; give a share from 0 to less than 1")
    if arguments.plot and is_main_process():
        check_plot(arguments.plot)
    report = json_lines(arguments.output if is_main_process() else None)
    keep_compiled_programs()
    find_devices(max(arguments.devices))
    _, model = open_model(arguments)
    rows = []
    for devices in sorted(arguments.devices, reverse=True):
        row = measure(arguments, model, devices)
        rows.append(row)
        report(row)
    if arguments.plot and is_main_process():
        draw(rows, arguments.plot)


def measure(arguments: argparse.Namespace, model: Checkpoint, devices: int) -> dict[str, Any]:
    """Measures one number of devices."""
    config = config_of(arguments, devices=devices)
    dtype = find_dtype(arguments.dtype)
    before = peak_memory()
    pipe = load_pipeline(model, config, dtype=dtype, scheduler=arguments.scheduler)
    pipe.set_progress_bar_config(disable=True)
    height, width = arguments.image_size or pipe.default_size
    loops: list[float] = []
    loop = pipe._denoise

    def timed(*inputs):
        jax.block_until_ready(inputs)
        start = time.perf_counter()
        result = jax.block_until_ready(loop(*inputs))
        loops.append(time.perf_counter() - start)
        return result

    pipe._denoise = timed
    calls = []
    for call in range(arguments.warmup_times + arguments.test_times):
        start = time.perf_counter()
        pipe(
            PROMPT,
            height=height,
            width=width,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            seed=call,
            output_type="np",
            chunk_size=arguments.chunk_size,
        )
        calls.append(time.perf_counter() - start)
    peak = peak_memory()
    measured = {
        "devices": devices,
        "processes": jax.process_count(),
        "mesh": dict(pipe.mesh.shape),
        "device": device_kind(),
        "model": arguments.model or "embedded",
        "image_size": [height, width],
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        **settings_of(config),
        "dtype": dtype.name,
        "jax": jax.__version__,
        "compile_s": round(pipe.programs.compile_seconds, 3),
        "loop_s": trimmed_mean(loops[arguments.warmup_times :], arguments.ignore_ratio),
        "end_to_end_s": trimmed_mean(calls[arguments.warmup_times :], arguments.ignore_ratio),
        "peak_bytes": peak if peak != before else None,
    }
    del pipe, loop, timed
    gc.collect()  # frees these weights before the next pipeline's are loaded
    return measured


def trimmed_mean(seconds: Sequence[float], ratio: float) -> float:
    """The mean without the share `ratio` of the values, half of it at each end."""
    cut = int(len(seconds) * ratio / 2)
    return round(statistics.fmean(sorted(seconds)[cut : len(seconds) - cut]), 5)


def peak_memory() -> int | None:
    """Peak bytes of any of this process's devices so far; None where the platform does not report them."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max(stat["peak_bytes_in_use"] for stat in stats) if all(stats) else None


def check_plot(path: Path) -> None:
    """Raises DistriError, before anything is measured, where `draw` would lack matplotlib or could not write."""
    if find_spec("matplotlib") is None:
        raise DistriError("--plot needs matplotlib; install the extra `eval`")
    check_file(path, "--plot")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots the speed-up over the fewest devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    rows = sorted(rows, key=lambda row: row["devices"])
    devices = [row["devices"] for row in rows]
    for column, words in (("loop_s", "denoising loop"), ("end_to_end_s", "end to end")):
        axes.plot(devices, [rows[0][column] / row[column] for row in rows], marker="o", label=words)
    axes.plot(devices, [each / devices[0] for each in devices], "--", color="grey", label="ideal")
    size = "x".join(map(str, rows[0]["image_size"]))
    axes.set(xlabel=f"devices ({rows[0]['device']})", ylabel="speed-up", title=f"{rows[0]['model']}, {size}")
    axes.set_xticks(devices)
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png")


if __name__ == "__main__":
    main()
