"""Speed-up of two processes with one core each over one process with one core.

    python benchmarks/scaling.py --image-size 512 --repeats 5 --output scaling.jsonl

Each process is pinned to a core before it starts, so that XLA starts one thread. One process has one device; two have one each
and divide the image as `WAYS` states. The ways take turns, and each repeat compares its own runs, so that other load on the
machine affects all of them alike. Compile time is separate; from the second repeat on, programs come from JAX's compilation
cache. The script prints a line of JSON for each way, with the median of the repeats and their range.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from distrijax import DistriError
from distrijax.cli.options import Parser, check_positive, json_lines, plain_errors

LATENCY_SCRIPT = Path(__file__).parent / "latency.py"

WAYS = {
    "one process": ["--devices", "1"],
    "cfg": ["--devices", "2"],
    "patch": ["--devices", "2", "--no-split-batch"],
}
"""Flags of latency.py: the whole image; one guidance branch in each process; half of the rows in each."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Flags; those of the process unless given.

    Raises:
        SystemExit: For wrong input, with a code other than 0 and one line on stderr.
    """
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", help="folder in the diffusers layout or hub id (default: the embedded model)")
    add("--image-size", type=int, nargs="+", default=[512], metavar=("H", "W"), help="pixels (default: 512)")
    add("--num-inference-steps", type=int, default=20, help="(default: %(default)s)")
    add("--warmup-steps", type=int, default=4, help="exact steps after the first (default: %(default)s)")
    add("--repeats", type=int, default=5, help="runs of each way, in turn (default: %(default)s)")
    add("--test-times", type=int, default=3, help="timed calls in a run (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="append the lines of JSON to a file")
    with plain_errors():
        benchmark(parser.parse_args(argv))


def benchmark(arguments: argparse.Namespace) -> None:
    """Runs the ways in turn and reports each one's speed-up; raises DistriError with fewer than two cores."""
    check_positive(arguments, "repeats", "test_times")
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        raise DistriError(f"this process may use {len(cores)} cores; give it 2 (Linux only)")
    report = json_lines(arguments.output)
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, flags in WAYS.items():
            rows[way].append(run(arguments, flags, cores))
    for way in WAYS:
        report(compare(way, rows[way], rows["one process"]))


def run(arguments: argparse.Namespace, flags: Sequence[str], cores: Sequence[int]) -> dict[str, Any]:
    """Runs latency.py for one way and returns its row; raises DistriError with what it printed where it fails."""
    size = [str(side) for side in arguments.image_size]
    times = ["--warmup-times", "1", "--test-times", str(arguments.test_times), "--ignore-ratio", "0"]
    steps = ["--num-inference-steps", str(arguments.num_inference_steps), "--warmup-steps", str(arguments.warmup_steps)]
    # the whole loop is one program: otherwise the host's work between steps would count as the devices' time
    call = [*flags, "--image-size", *size, *steps, *times, *(["--model", arguments.model] if arguments.model else [])]
    processes = 1 if flags == WAYS["one process"] else 2
    coordinator = f"127.0.0.1:{free_port()}"
    # files, because pipes that nobody reads would fill; the row in one of its own, because libraries write to stdout and stderr
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        row, started = Path(folder) / "row.jsonl", []
        for number, core in enumerate(cores[:processes]):
            several = ["--coordinator", coordinator, "--num-processes", str(processes), "--process-id", str(number)]
            command = [sys.executable, str(LATENCY_SCRIPT), *call, *several, "--output", str(row)]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            started.append(pinned(command, core, env=environment, stdout=log, stderr=log))
        codes = [process.wait() for process in started]
        log.seek(0)
        if any(codes):
            raise DistriError(f"latency.py failed: {log.read().strip()}")
        return json.loads(row.read_text())


def pinned(command: Sequence[str], core: int, **settings: Any) -> subprocess.Popen:
    """Starts a process on one core, from its beginning: a child inherits its parent's affinity."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return subprocess.Popen(command, **settings)
    finally:
        os.sched_setaffinity(0, allowed)


def compare(way: str, rows: Sequence[dict[str, Any]], ones: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a way's repeats, and its speed-up over one process: median, minimum and maximum."""
    result = {"way": way, "processes": 1 if rows is ones else 2, **{name: rows[0][name] for name in KEPT}}
    for column in ("loop_s", "end_to_end_s"):
        ratios = [one[column] / row[column] for row, one in zip(rows, ones, strict=True)]
        result[column] = round(statistics.median(row[column] for row in rows), 4)
        result[column.replace("_s", "_speed_up")] = [
            round(ratio, 3) for ratio in (statistics.median(ratios), min(ratios), max(ratios))
        ]
    compiling = round(statistics.median(row["compile_s"] for row in rows), 3)
    return {**result, "compile_s": compiling, "repeats": len(rows), "cpu": cpu(), "jax": jax.__version__}


KEPT = ("mesh", "model", "image_size", "num_inference_steps", "warmup_steps", "sync_mode", "dtype")
"""Fields of latency.py's rows that are the same for all repeats."""


def free_port() -> int:
    """A port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def cpu() -> str:
    """The processor's name, or its architecture where the name is unknown."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
