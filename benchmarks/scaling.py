"""How much faster are two processes with a core each than one process with one core?

    python benchmarks/scaling.py --image-size 512 --repeats 5 --output scaling.jsonl

Each process is pinned to a core before it starts, so that XLA makes one thread. One process has one device; two have one each,
and share the picture in the ways of `WAYS`. The ways take turns, and each repeat compares its own runs, so what else the machine
does falls on all alike. Compiling is timed apart; from the second repeat on, JAX's compilation cache is only read. A line of JSON
for each way, with the median of the repeats and their spread.
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
"""Flags of latency.py: the whole picture; a branch of the guidance in each process; half of the rows in each."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; raises SystemExit with a code other than 0, after one line on stderr, for wrong input."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", help="folder in the diffusers layout or hub id (default: the embedded model)")
    add("--image-size", type=int, nargs="+", default=[512], metavar=("H", "W"), help="pixels (default: 512)")
    add("--num-inference-steps", type=int, default=20, help="(default: %(default)s)")
    add("--warmup-steps", type=int, default=4, help="exact steps after the first (default: %(default)s)")
    add("--repeats", type=int, default=5, help="of all ways in turn (default: %(default)s)")
    add("--test-times", type=int, default=3, help="timed calls in a run (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="lines of JSON are added to it, besides being printed")
    with plain_errors():
        benchmark(parser.parse_args(argv))


def benchmark(arguments: argparse.Namespace) -> None:
    """Runs the ways in turn, and tells of each how it compares; raises DistriError where there are not two cores."""
    check_positive(arguments, "repeats", "test_times")
    cores = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        raise DistriError(f"this process may use {len(cores)} cores; give it 2 (Linux only)")
    tell = json_lines(arguments.output)
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, flags in WAYS.items():
            rows[way].append(run(arguments, flags, cores))
    for way in WAYS:
        tell(compare(way, rows[way], rows["one process"]))


def run(arguments: argparse.Namespace, flags: Sequence[str], cores: Sequence[int]) -> dict[str, Any]:
    """What latency.py tells of one way; raises DistriError with what it says where it fails."""
    size = [str(side) for side in arguments.image_size]
    times = ["--warmup-times", "1", "--test-times", str(arguments.test_times), "--ignore-ratio", "0"]
    steps = ["--num-inference-steps", str(arguments.num_inference_steps), "--warmup-steps", str(arguments.warmup_steps)]
    # the whole loop is one program: the host's visits between steps would be counted as the devices' time
    call = [*flags, "--image-size", *size, *steps, *times, *(["--model", arguments.model] if arguments.model else [])]
    processes = 1 if flags == WAYS["one process"] else 2
    coordinator = f"127.0.0.1:{free_port()}"
    # files, for a pipe that nobody reads would fill; apart, for libraries have things to say on stderr
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = []
        for number, core in enumerate(cores[:processes]):
            several = ["--coordinator", coordinator, "--num-processes", str(processes), "--process-id", str(number)]
            command = [sys.executable, str(LATENCY_SCRIPT), *call, *several]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            started.append(pinned(command, core, env=environment, stdout=output, stderr=errors))
        codes = [process.wait() for process in started]
        output.seek(0), errors.seek(0)
        if any(codes):
            raise DistriError(f"latency.py failed: {errors.read().strip()}")
        return json.loads(output.read())


def pinned(command: Sequence[str], core: int, **settings: Any) -> subprocess.Popen:
    """A process that has had one core since it began: a child takes over its parent's."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return subprocess.Popen(command, **settings)
    finally:
        os.sched_setaffinity(0, allowed)


def compare(way: str, rows: Sequence[dict[str, Any]], ones: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a way's repeats, and of how many times as fast as one process each was, with the least and the most."""
    told = {"way": way, "processes": 1 if rows is ones else 2, **{name: rows[0][name] for name in KEPT}}
    for column in ("loop_s", "end_to_end_s"):
        ratios = [one[column] / row[column] for row, one in zip(rows, ones, strict=True)]
        told[column] = round(statistics.median(row[column] for row in rows), 4)
        told[column.replace("_s", "_speed_up")] = [
            round(ratio, 3) for ratio in (statistics.median(ratios), min(ratios), max(ratios))
        ]
    compiling = round(statistics.median(row["compile_s"] for row in rows), 3)
    return {**told, "compile_s": compiling, "repeats": len(rows), "cpu": cpu(), "jax": jax.__version__}


KEPT = ("mesh", "model", "image_size", "num_inference_steps", "warmup_steps", "sync_mode", "dtype")
"""Of what latency.py tells, what all repeats have in common."""


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def cpu() -> str:
    """The processor's name, where the machine tells."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
