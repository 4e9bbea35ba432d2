"""Time and memory of loading a single file of Stable Diffusion XL, compared with loading its folder.

    python benchmarks/load_file.py --repeats 3
    python benchmarks/load_file.py --scale 0.5            # half the transformer layers

The benchmark writes the folder in the diffusers layout and then the single file (names and shapes of Stable Diffusion XL, random
weights, float16, 6.9 GB) to --folder, one after the other, which needs free space for one of them, and removes both. Each repeat
loads a pipeline on one device in a process of its own. `load_seconds` is the time of `load_pipeline`, `seconds` that of the whole
process, imports included, and `cpu_seconds` the processor time of its threads, which other processes disturb less. `peak_gb` is the
process's largest resident memory, pages of mapped files included; `own_gb` leaves those out (as Linux reports it, sampled every
20 ms). The files are in the page cache, as far as it has room.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert_file import FAMILY_NAMES, random_checkpoint, run

from distrijax import DistriError
from distrijax.cli.options import Parser, check_positive, json_lines, plain_errors
from distrijax.convert.layouts.folder import write_folder
from distrijax.convert.layouts.original import from_original, to_original
from distrijax.convert.readers.safetensors_files import write_safetensors
from distrijax.weights.dtypes import DTYPES

LOAD = """
import sys, time
from pathlib import Path
from distrijax import DistriConfig, load_pipeline
source, dtype, report = sys.argv[1:]
start = time.perf_counter()
pipe = load_pipeline(source, DistriConfig(devices=1), dtype=dtype)
Path(report).write_text(str(time.perf_counter() - start))
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
    family = "version of Stable Diffusion (default: %(default)s)"
    add("--family", choices=tuple(FAMILY_NAMES), default="xl", help=family)
    add("--scale", type=float, default=1.0, help="share of the layers that repeat (default: %(default)s)")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="to load in (default: %(default)s)")
    place = "where to put the temporary files (default: %(default)s)"
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help=place)
    add("--repeats", type=int, default=3, help="runs of each (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="append the lines of JSON to a file")
    with plain_errors():
        benchmark(parser.parse_args(argv))


def benchmark(arguments: argparse.Namespace) -> None:
    """Writes both, loads each, and reports their ratio; raises DistriError for missing space."""
    check_positive(arguments, "repeats")
    if not 0 < arguments.scale <= 1:
        raise DistriError(f"--scale is {arguments.scale}; give a share above 0 and at most 1")
    if not arguments.folder.is_dir():
        raise DistriError(f"--folder {arguments.folder} is not a folder; give one that exists")
    report = json_lines(arguments.output)
    original = to_original(random_checkpoint(FAMILY_NAMES[arguments.family], arguments.scale))
    checkpoint = from_original(original, "the random model")
    size = sum(tensor.nbytes for tensor in original.values())
    free = shutil.disk_usage(arguments.folder).free
    if free < 1.1 * size:
        raise DistriError(
            f"{arguments.folder} has {free / 1e9:.3g} GB free and {1.1 * size / 1e9:.3g} are needed; use --folder"
        )
    writers = {
        "folder": lambda path: write_folder(checkpoint, path),
        "single file": lambda path: write_safetensors(original, path),
    }
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "gigabytes": round(size / 1e9, 2)}
    medians = []
    for way, write in writers.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            write(Path(scratch, "model"))
            runs = [load(Path(scratch), arguments.dtype) for _ in range(arguments.repeats)]
        medians.append({key: round(statistics.median(one[key] for one in runs), 3) for key in runs[0]})
        report({"way": way, "dtype": arguments.dtype, **medians[-1], **machine})
    folder, single = medians
    report(
        {"way": "single file / folder", **{key: round(single[key] / folder[key], 3) for key in folder if folder[key]}}
    )


def load(scratch: Path, dtype: str) -> dict[str, Any]:
    """Loads the model in a folder in another process."""
    seconds = scratch / "seconds"
    used = run([sys.executable, "-c", LOAD, str(scratch / "model"), dtype, str(seconds)])
    return {"load_seconds": float(seconds.read_text()), **used}


if __name__ == "__main__":
    main()
