"""How long does one picture take, on how many devices?

    python benchmarks/latency.py --devices 1 2 4 8 --model MODEL --image-size 1024 --output latency.jsonl --plot speed-up.png

The protocol of DistriFusion's script: some calls to warm up, then timed ones, of which the slowest and the fastest are left
out. Told apart: compiling; the denoising loop alone (the UNet and the scheduler, as in the paper); end to end, with text
encoders and decoder; and the most memory that a device had in use. A line of JSON for each number of devices, the most devices
first. Virtual CPU devices share the machine's cores: their figures show what more devices cost, not what they gain.

compile_s     tracing and compiling; what an earlier run left in JAX's compilation cache is only read, in far less time
              (JAX_ENABLE_COMPILATION_CACHE=false compiles anew)
peak_bytes    null where the platform does not tell, and where no device had more in use than in a run before: devices count
              for the whole process, so the most devices, which need the least of each, go first
"""

from __future__ import annotations

from distrijax.cli.start import begin

if __name__ == "__main__":
    begin()  # before imports that take seconds

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
from distrijax.cli.generate import PROMPT
from distrijax.cli.multiprocess import add_flags, ending_together, join
from distrijax.cli.options import (
    Parser,
    add_model_flags,
    check_positive,
    device_kind,
    find_devices,
    find_dtype,
    find_model,
    json_lines,
    keep_compiled_programs,
    plain_errors,
    written_whole,
)
from distrijax.convert.cache import Prepared
from distrijax.flags import add_config_flags, config_of, settings_of
from distrijax.parallel.processes import is_main_process
from distrijax.validate import check_file, positive
from distrijax.weights.dtypes import DTYPES


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; raises SystemExit with a code other than 0, after one line on stderr, for wrong input."""
    arguments = parse(argv)
    with ending_together(), plain_errors():
        positive(min(arguments.devices), "--devices")
        join(arguments, max(arguments.devices))
        benchmark(arguments)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--devices",
        type=int,
        nargs="+",
        default=[1],
        help="how many share a picture; several are compared (default: 1)",
    )
    add_model_flags(parser)
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on accelerators, float32 on CPUs)")
    add("--image-size", type=int, nargs="+", metavar=("H", "W"), help="pixels (default: the model's)")
    add("--num-inference-steps", type=int, default=50, help="(default: %(default)s)")
    add("--guidance-scale", type=float, default=5.0, help="(default: %(default)s)")
    add("--scheduler", choices=tuple(SCHEDULERS), default="ddim", help="(default: %(default)s)")
    add_config_flags(parser)
    add("--chunk-size", type=int, help="steps for each visit of the host (default: the whole loop is one program)")
    add("--warmup-times", type=int, default=5, help="calls before any is timed (default: %(default)s)")
    add("--test-times", type=int, default=20, help="timed calls (default: %(default)s)")
    add(
        "--ignore-ratio", type=float, default=0.2, help="part of them left out, half at each end (default: %(default)s)"
    )
    add_flags(parser)
    add("--output", type=Path, metavar="FILE", help="lines of JSON are added to it, besides being printed")
    add("--plot", type=Path, metavar="FILE", help="speed-up against devices (PNG; extra `eval`)")
    arguments = parser.parse_args(argv)
    arguments.image_size = parser.size(arguments.image_size)
    return arguments


def benchmark(arguments: argparse.Namespace) -> None:
    """Measures for every number of devices; raises DistriError for flags that cannot be."""
    check_positive(arguments, "warmup_times", "test_times")
    if not 0 <= arguments.ignore_ratio < 1:
        raise DistriError(f"--ignore-ratio is {arguments.ignore_ratio}; give a part of all, from 0 to less than 1")
    if arguments.plot and is_main_process():
        check_plot(arguments.plot)
    tell = json_lines(arguments.output if is_main_process() else None)
    keep_compiled_programs()
    find_devices(max(arguments.devices))
    _, model = find_model(arguments)
    rows = []
    for devices in sorted(arguments.devices, reverse=True):
        row = measure(arguments, model, devices)
        rows.append(row)
        tell(row)
    if arguments.plot and is_main_process():
        draw(rows, arguments.plot)


def measure(arguments: argparse.Namespace, model: Prepared, devices: int) -> dict[str, Any]:
    """The figures of one number of devices."""
    config = config_of(arguments, devices=devices)
    dtype = find_dtype(arguments.dtype)
    before = peak_memory()
    pipe = load_pipeline(model.folder, config, dtype=dtype, variant=model.variant, scheduler=arguments.scheduler)
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
        "compile_s": round(pipe.programs.seconds, 3),
        "loop_s": trimmed_mean(loops[arguments.warmup_times :], arguments.ignore_ratio),
        "end_to_end_s": trimmed_mean(calls[arguments.warmup_times :], arguments.ignore_ratio),
        "peak_bytes": peak if peak != before else None,
    }
    del pipe, loop, timed
    gc.collect()  # the next pipeline's weights must not come on top of these
    return measured


def trimmed_mean(seconds: Sequence[float], ratio: float) -> float:
    """The mean without the `ratio` of the values that are furthest out, half of them at each end."""
    cut = int(len(seconds) * ratio / 2)
    return round(statistics.fmean(sorted(seconds)[cut : len(seconds) - cut]), 5)


def peak_memory() -> int | None:
    """The most bytes that any of this process' devices had in use so far; None where the platform does not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max(stat["peak_bytes_in_use"] for stat in stats) if all(stats) else None


def check_plot(path: Path) -> None:
    """Raises DistriError, before anything is measured, where `draw` lacks matplotlib or could not write."""
    if find_spec("matplotlib") is None:
        raise DistriError("--plot needs matplotlib; install the extra `eval`")
    check_file(path, "--plot")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up over the fewest devices."""
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
    with written_whole(path) as beside:
        figure.savefig(beside, format="png")


if __name__ == "__main__":
    main()
