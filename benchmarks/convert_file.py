"""Time and memory of converting a single file of Stable Diffusion XL to a folder, compared with torch diffusers.

    python benchmarks/convert_file.py --repeats 3

The benchmark writes a file in the original layout, with the names and shapes of Stable Diffusion XL (random weights, float16,
6.9 GB; --family chooses a smaller one), to --folder, which needs free space for two and a half such files, and removes it at
the end. Each repeat runs `python -m distrijax.convert`, and diffusers' from_single_file with save_pretrained, each in a process
of its own. `seconds` is the time of the whole process, imports included, and `cpu_seconds` the processor time of its threads, which
other processes disturb less. `peak_gb` is the process's largest resident memory, pages of mapped files included; `own_gb` leaves
those out (as Linux reports it, sampled every 20 ms). The file is in the page cache. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distrijax import DistriError
from distrijax.cli.options import Parser, check_positive, json_lines, plain_errors
from distrijax.convert.complete import params_of
from distrijax.convert.layouts.families import FAMILIES
from distrijax.convert.layouts.original import to_original
from distrijax.convert.readers.safetensors_files import write_safetensors
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.load import stored_shapes
from distrijax.weights.tensors import Shape, Tensor

FAMILY_NAMES = {"xl": "SDXL", "1": "SD1", "2": "SD2"}

DIFFUSERS_SCRIPT = """
import sys, torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
file, config, folder, pipeline = sys.argv[1:]
pipe = globals()[pipeline].from_single_file(file, config=config, local_files_only=True, torch_dtype=torch.float16)
pipe.save_pretrained(folder)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Flags; those of the process unless given.

    Raises:
        SystemExit: For wrong input, with a code other than 0 and one line on stderr.
    """
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--family", choices=tuple(FAMILY_NAMES), default="xl", help="version of Stable Diffusion (default: %(default)s)"
    )
    add(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where to put the temporary files (default: %(default)s)",
    )
    add("--repeats", type=int, default=3, help="runs of each, in turn (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="append the lines of JSON to a file")
    with plain_errors():
        benchmark(parser.parse_args(argv))


def benchmark(arguments: argparse.Namespace) -> None:
    """Writes the file, runs both in turn, and reports their ratio; raises DistriError for missing packages or space."""
    check_positive(arguments, "repeats")
    if not all(map(find_spec, ("diffusers", "torch"))):
        raise DistriError("this benchmark needs diffusers and torch; install the extra `test`")
    if not arguments.folder.is_dir():
        raise DistriError(f"--folder {arguments.folder} is not a folder; give one that exists")
    report = json_lines(arguments.output)
    checkpoint = random_checkpoint(FAMILY_NAMES[arguments.family])
    size = sum(tensor.nbytes for held in checkpoint.tensors.values() for tensor in held.values())
    free = shutil.disk_usage(arguments.folder).free
    if free < 2.5 * size:
        raise DistriError(
            f"{arguments.folder} has {free / 1e9:.3g} GB free and {2.5 * size / 1e9:.3g} are needed; use --folder"
        )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        ways = commands(checkpoint, Path(folder))
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(arguments.repeats):
            for way, command in ways.items():
                runs[way].append(run(command))
                shutil.rmtree(Path(folder) / "out")
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "gigabytes": round(size / 1e9, 2)}
    for way, each in runs.items():
        report({"way": way, **{key: statistics.median(one[key] for one in each) for key in each[0]}, **machine})
    ratios = {
        key: statistics.median(one[key] / other[key] for one, other in zip(*runs.values(), strict=True))
        for key in runs["distrijax"][0]
    }
    report({"way": "distrijax / diffusers", **{key: round(value, 3) for key, value in ratios.items()}})


def commands(checkpoint: Checkpoint, folder: Path) -> dict[str, list[str]]:
    """Writes the single file to `folder`, and returns the two commands that convert it to `folder / "out"`."""
    file, config, out = (str(folder / name) for name in ("model.safetensors", "config", "out"))
    write_safetensors(to_original(checkpoint), Path(file))
    convert = [sys.executable, "-m", "distrijax.convert", file]
    run([*convert, config])  # for the configurations, which diffusers would download from the hub
    for weights in Path(config).glob("*/*.safetensors"):
        weights.unlink()
    diffusers = [sys.executable, "-c", DIFFUSERS_SCRIPT, file, config, out, checkpoint.index["_class_name"]]
    return {"distrijax": [*convert, out], "diffusers": diffusers}


def random_checkpoint(kind: str, scale: float = 1.0) -> Checkpoint:
    """A model of full size, or with a share `scale` of the layers that repeat, whose tensors are generated when they are read."""
    family = next(family for family in FAMILIES.values() if family.kind.name == kind)
    parts = ["unet", "vae", *(text.part for text in family.texts)]
    prediction = family.scheduler["prediction_type"]
    configs = {part: family.base(part, prediction) for part in [*parts, "scheduler"]}
    for part, key in [
        ("unet", "transformer_layers_per_block"),
        *((text.part, "num_hidden_layers") for text in family.texts),
    ]:
        held = configs[part][key]
        shorter = [max(1, round(scale * each)) for each in (held if isinstance(held, list) else [held])]
        configs[part][key] = shorter if isinstance(held, list) else shorter[0]
    empty = Checkpoint(family.index, configs, {}, {})
    tensors = {
        part: {name: random(shape) for name, shape in stored_shapes(params_of(empty, part)).items()} for part in parts
    }
    return Checkpoint(family.index, configs, tensors, {})


def random(shape: Shape) -> Tensor:
    """Normal random numbers in float16."""

    def read() -> np.ndarray:
        return np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)

    return Tensor(shape, np.dtype(np.float16), read)


def run(command: list[str]) -> dict[str, Any]:
    """Runs a command and returns its seconds and gigabytes; raises DistriError where it fails."""
    start = time.perf_counter()
    peak = own = 0.0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while True:
            held = memory(process.pid)  # not wait4's ru_maxrss, which begins at the parent's memory
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak, own = max(peak, held.get("VmHWM", 0.0)), max(own, held.get("RssAnon", 0.0))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
            raise DistriError(f"{command[1:3]} failed: {lines[-1]}; run it by itself to see more")
    cpu = used.ru_utime + used.ru_stime
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_gb": round(peak, 3),
        "own_gb": round(own, 3),
    }


def memory(pid: int) -> dict[str, float]:
    """Gigabytes of a process, by the names of /proc/PID/status; empty where the system has no such file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e9 for line in lines if line.endswith(" kB")}


if __name__ == "__main__":
    main()
