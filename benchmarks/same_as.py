"""Does another revision of this project generate the same images, bit for bit? Compile to as much? Take as long?

    python benchmarks/same_as.py main                 the working tree beside the branch main
    python benchmarks/same_as.py v1 HEAD --plan       programs for GPUs: collectives, bytes, memory, projection (extra `plan`)
    python benchmarks/same_as.py v1 HEAD --time       start-up, generate.py's first and second run, a UNet call; in turn

Each revision is copied to a temporary folder and runs in processes of its own, with its own package whatever is installed, and
compiles for itself. Both run BEFORE's embedded model, on virtual CPU devices: latents and decoded images of every setting in
`SETTINGS` are compared. Only the package's public names are used, so the script runs any revision. Its exit code is 1 where
anything but a time differs. Working tree: what git tracks or would add.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import itertools
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from revisions import WORKING_TREE, Failure, resolved, run, tree_of

PROMPT = "a large blue star at the top left and a small red triangle in the center, on a striped yellow background"


class Setting(NamedTuple):
    """config: of DistriConfig. call: of the pipeline's call. load: of load_pipeline. Each beside `USUAL`."""

    config: dict[str, Any] = {}
    call: dict[str, Any] = {}
    load: dict[str, Any] = {}


USUAL = Setting(
    config={"devices": 8, "warmup_steps": 1},
    call={"height": 128, "width": 128, "num_inference_steps": 5, "chunk_size": None, "seed": 7},
    load={"dtype": "float32"},
)
"""Two synchronous steps and three displaced ones, as one program; a mesh of 2 branches x 4 patches."""

SYNC_MODES = (
    "corrected_async_gn",
    "damped_async_gn",
    "async_tokens",
    "stale_gn",
    "sync_gn",
    "separate_gn",
    "full_sync",
    "no_sync",
)
SCHEDULERS = ("euler", "euler-ancestral", "dpm++2m", "pndm", "lcm")
ODD_SIZE = {"height": 104, "width": 72}

SETTINGS = {
    "1 device": Setting({"devices": 1}),
    **{f"sync_mode {mode}": Setting({"sync_mode": mode}) for mode in SYNC_MODES},
    "extrapolate": Setting({"extrapolate": True}),
    "compress int8": Setting({"compress": "int8"}),
    "compress int4": Setting({"compress": "int4"}),
    "sync_steps, chunks of 2": Setting({"sync_steps": [3]}, {"chunk_size": 2}),
    "chunks of 2": Setting(call={"chunk_size": 2}),
    "chunks of 1, guidance_rescale": Setting(call={"chunk_size": 1, "guidance_rescale": 0.7}),
    "naive_patch row": Setting({"parallelism": "naive_patch", "split_scheme": "row"}),
    "naive_patch column": Setting({"parallelism": "naive_patch", "split_scheme": "column"}),
    "naive_patch alternate": Setting({"parallelism": "naive_patch", "split_scheme": "alternate"}),
    "naive_patch, odd size": Setting({"parallelism": "naive_patch"}, ODD_SIZE),
    "tensor": Setting({"parallelism": "tensor"}),
    "tensor, no CFG split": Setting({"parallelism": "tensor", "split_batch": False}),
    "shard_weights": Setting({"shard_weights": True}),
    "shard_weights, tensor": Setting({"shard_weights": True, "parallelism": "tensor"}),
    "no CFG split": Setting({"split_batch": False}),
    "no guidance": Setting(call={"guidance_scale": 1.0}),
    "odd size": Setting(call=ODD_SIZE),
    "odd size, no CFG split": Setting({"split_batch": False}, ODD_SIZE),
    "3 devices": Setting({"devices": 3}),
    "6 devices": Setting({"devices": 6}),
    "two images on the axis data": Setting({"data": 2}, {"num_images_per_prompt": 2}),
    "bfloat16": Setting(load={"dtype": "bfloat16"}),
    **{
        f"scheduler {name}": Setting({"devices": 2, "sync_mode": "full_sync"}, load={"scheduler": name})
        for name in SCHEDULERS
    },
}

EMBEDDED = "EMBEDDED"  # stands for the folder of BEFORE's embedded model

PLANS = {
    "embedded, 256x256": ["--model", EMBEDDED, "--image-size", "256"],
    "embedded, 256x256, tensor": ["--model", EMBEDDED, "--image-size", "256", "--parallelism", "tensor"],
    "embedded, 256x256, shard_weights": ["--model", EMBEDDED, "--image-size", "256", "--shard-weights"],
    "SDXL, 1024x1024": ["--image-size", "1024"],
    "SDXL, 1024x1024, int8": ["--image-size", "1024", "--compress", "int8", "--no-baseline"],
}
"""Flags of `python -m distrijax.plan`, which is told of 8 devices."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; raises SystemExit, with 1 where the revisions differ or with a sentence where one cannot run."""
    arguments = parse(argv)
    try:
        if not same(arguments):
            sys.exit(1)
    except Failure as failure:
        sys.exit(f"error: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("before", metavar="BEFORE", help="a revision, as git names it")
    add("after", metavar="AFTER", nargs="?", default=WORKING_TREE, help="another (default: the working tree)")
    add("--images", action="store_true", help="compare latents and images (the default)")
    add("--plan", action="store_true", help="compare what `python -m distrijax.plan` says of some settings, in numbers")
    add("--time", action="store_true", help="compare times; nothing else should run on the machine")
    add("--only", nargs="+", metavar="WORD", help="settings whose names contain one of these words")
    add("--repeats", type=int, default=5, help="of --time (default: %(default)s)")
    add(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="BEFORE's results are written there, and read from there the next time",
    )
    return parser.parse_args(argv)


def same(arguments: argparse.Namespace) -> bool:
    """Whether all that was asked for is equal; prints a table of each."""
    if arguments.repeats < 1:
        raise Failure(f"--repeats is {arguments.repeats}; give a whole number of at least 1")
    parts = {"images": (SETTINGS, compare_images), "plan": (PLANS, compare_plans)}
    wanted = {part: parts[part] for part in parts if getattr(arguments, part)}
    if not wanted and not arguments.time:
        wanted = {"images": parts["images"]}
    chosen = {part: chosen_of(settings, arguments.only) for part, (settings, _) in wanted.items()}
    before, after = resolved(arguments.before), resolved(arguments.after)
    equal = True
    with tree_of(before) as old, tree_of(after) as new, kept(arguments.keep, before) as folder:
        for part, (_, compare) in wanted.items():
            equal = compare(chosen[part], old, new, folder) and equal
        if arguments.time:
            compare_times(old, new, arguments.repeats)
    return equal


def chosen_of(settings: dict[str, Any], words: Sequence[str] | None) -> list[str]:
    """The names that contain one of the words; raises Failure where none does."""
    names = [name for name in settings if not words or any(word in name for word in words)]
    if not names:
        raise Failure(f"no setting contains {' or '.join(words)}; there are: {'; '.join(settings)}")
    return names


# What is kept


@contextlib.contextmanager
def kept(folder: Path | None, revision: str) -> Iterator[Path]:
    """Where BEFORE's results are: below `folder`, by what they depend on, or in a temporary folder."""
    if folder is None or revision == WORKING_TREE:
        with tempfile.TemporaryDirectory(prefix="same_as-") as name:
            yield Path(name)
        return
    machine = digest(f"{cpu()} {os.cpu_count()} {os.environ.get('XLA_FLAGS')}".encode())[:8]
    place = folder.resolve() / f"{revision[:12]}-jax-{version('jax')}-{machine}"
    place.mkdir(parents=True, exist_ok=True)
    yield place


def cpu() -> str:
    """The processor's name, where the machine tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_of(folder: Path, name: str, settings: Any, suffix: str) -> Path:
    """Where a setting's result lies; another setting of the same name has another file."""
    return folder / f"{re.sub('[^a-z0-9_+]+', '-', name.lower())}-{digest(repr(settings).encode())[:8]}{suffix}"


# Processes with a revision's package


def worker(tree: Path, kind: str, *words: str | Path, **variables: str) -> str:
    """What one of `WORKERS` prints in a process with a revision's package."""
    return run(tree, Path(__file__).resolve(), WORKER, kind, *words, **variables)


def check_package() -> None:
    """Raises Failure, in a worker, where Python found another package than the revision's."""
    tree = Path.cwd().resolve()
    for name in ("distrijax", "distrijax.convert"):
        found = Path(importlib.import_module(name).__file__).resolve()
        if not found.is_relative_to(tree):
            raise Failure(f"{name} was imported from {found}, not from {tree}; start Python without what puts it first")


# Images


def compare_images(names: Sequence[str], old: Path, new: Path, keep: Path) -> bool:
    """Whether latents and images of these settings are the same bytes; prints a row for each setting."""
    row = "{:34} {:32} {:32} {}".format
    print(row("setting", "latents", "image", "sha256 of BEFORE's"), flush=True)
    equal = True
    files = {name: file_of(keep, name, (USUAL, SETTINGS[name]), ".npz") for name in names}
    for name, before, after in results(images_of, files, old, new):
        verdicts = [verdict(before, after, part) for part in ("latents", "image")]
        hashes = "" if isinstance(before, str) else " ".join(array_digest(part)[:16] for part in before.values())
        print(row(name, *verdicts, hashes), flush=True)
        equal = equal and verdicts == ["equal", "equal"]
    print(f"{len(names)} settings: {'all equal' if equal else 'NOT all equal'}")
    return equal


def results(
    result_of: Callable[[Path, Path, str, Path | None], Any], files: dict[str, Path], old: Path, new: Path
) -> Iterator[tuple[str, Any, Any]]:
    """Each setting's name and the two revisions' results, of which BEFORE's are kept in `files`; several are made at a time."""
    model = model_of(old)
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 4))  # a process takes up to 1 GB
    try:
        pending = [
            (name, pool.submit(result_of, old, model, name, file), pool.submit(result_of, new, model, name, None))
            for name, file in files.items()
        ]
        for name, before, after in pending:
            yield name, before.result(), after.result()
    finally:
        pool.shutdown(cancel_futures=True)


def model_of(tree: Path) -> Path:
    """The folder of a revision's embedded model."""
    return Path(run(tree, "-c", "import distrijax; print(distrijax.DEFAULT_MODEL)").strip())


def images_of(tree: Path, model: Path, name: str, file: Path | None) -> dict[str, np.ndarray] | str:
    """A setting's latents and image, from `file` if it is there, or why there are none."""
    with tempfile.TemporaryDirectory(prefix="same_as-") as folder:
        made = Path(folder) / "made.npz"
        if file is None or not file.exists():
            try:
                worker(tree, "images", model, name, made)
            except Failure as failure:
                return str(failure)
            if file is None:
                file = made
            else:
                shutil.copy(made, file)
        with np.load(file) as arrays:
            return {part: arrays[part] for part in ("latents", "image")}


def verdict(before: dict[str, np.ndarray] | str, after: dict[str, np.ndarray] | str, part: str) -> str:
    """In a few words, how a part of two results compares; "equal" only for the same bytes."""
    if isinstance(before, str) or isinstance(after, str):
        return f"BEFORE failed: {before}" if isinstance(before, str) else f"AFTER failed: {after}"
    old, new = before[part], after[part]
    if array_digest(old) == array_digest(new):
        return "equal"
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"{old.dtype}{list(old.shape)}, now {new.dtype}{list(new.shape)}"
    return f"largest difference {np.max(np.abs(new.astype(np.float64) - old.astype(np.float64))):.3g}"


def array_digest(array: np.ndarray) -> str:
    return digest(f"{array.dtype} {array.shape} ".encode() + array.tobytes())


def write_images(model: str, name: str, file: str) -> None:
    """In a worker: a setting's results."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    check_package()
    np.savez(file, **generate(model, SETTINGS[name]))


def generate(model: str | Path, setting: Setting) -> dict[str, np.ndarray]:
    """The latents and the decoded image (float32, before it is rounded) of a setting, with the package that is imported."""
    from distrijax import DistriConfig, load_pipeline

    usual = USUAL._asdict()
    config, call, load = ({**usual[part], **given} for part, given in setting._asdict().items())
    pipe = load_pipeline(model, DistriConfig(**config), **load)
    pipe.set_progress_bar_config(disable=True)
    latents, image = (np.asarray(pipe(PROMPT, output_type=kind, **call).images) for kind in ("latent", "np"))
    return {"latents": latents, "image": image}


# Programs for GPUs


def compare_plans(names: Sequence[str], old: Path, new: Path, keep: Path) -> bool:
    """Whether the plans have the same numbers, line by line; prints a row for each plan, and the lines that differ."""
    equal = True
    files = {name: file_of(keep, name, PLANS[name], ".txt") for name in names}
    for name, before, after in results(plan_of, files, old, new):
        lines = differing(before[1:], after[1:])
        programs = "same program" if before[0] == after[0] else "another program"
        print(f"{name:34} {'DIFFERS' if lines else 'equal'}, {programs}", *lines, sep="\n    ", flush=True)
        equal = equal and not lines
    print(f"{len(names)} plans: {'all equal' if equal else 'NOT all equal'}")
    return equal


def plan_of(tree: Path, model: Path, name: str, file: Path | None) -> list[str]:
    """A digest of the scheduled program, then what the command prints but for times of compiling; from `file` if it is there."""
    if file is not None and file.exists():
        return file.read_text().splitlines()
    with tempfile.TemporaryDirectory(prefix="same_as-") as folder:
        program = Path(folder) / "program.txt"
        flags = [str(model) if flag == EMBEDDED else flag for flag in PLANS[name]]
        told = run(tree, "-m", "distrijax.plan", "--devices", "8", *flags, "--hlo", program)
        if not program.exists():
            raise Failure("`python -m distrijax.plan` ended well and wrote no program; see whether it runs at all")
        plan = [line for line in told.splitlines() if not line.startswith("compiled")]
        plan = [digest(plain_program(program.read_text()).encode()), *plan]
    if file is not None:
        file.write_text("\n".join(plan) + "\n")
    return plan


def plain_program(hlo: str) -> str:
    """The instructions without what follows from names and places in the source: metadata, and instructions' names."""
    names: dict[str, str] = {}
    lines = [line for line in hlo.splitlines() if "%" in line]
    plain = [re.sub(r', metadata=\{(?:[^{}"]|"[^"]*")*\}', "", line) for line in lines]
    return re.sub(r"%[\w.-]+", lambda match: names.setdefault(match[0], f"%{len(names)}"), "\n".join(plain))


def differing(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The lines whose numbers differ, as they were and as they are; words may differ."""
    pairs = itertools.zip_longest(before, after, fillvalue="")
    return [line for old, new in pairs if numbers(old) != numbers(new) for line in (f"- {old}", f"+ {new}")]


def numbers(line: str) -> list[str]:
    """All numbers of a line, with their units."""
    return re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?(?: (?:[kMGT]?B|m?s|TFLOP|million)\b)?", line)


# Times


def compare_times(old: Path, new: Path, repeats: int) -> None:
    """Prints medians of each time, and of the ratio of the runs of a repeat, with the least and the most."""
    model = model_of(old)
    for tree in (old, new):
        start_up(tree, model)  # Python compiles the source once
    rows: list[tuple[dict[str, float], dict[str, float]]] = []
    for repeat in range(repeats):
        order = (old, new) if repeat % 2 == 0 else (new, old)
        taken = {tree: times_of(tree, model) for tree in order}
        rows.append((taken[old], taken[new]))
    row = "{:34} {:>26} {:>26} {:>24}".format
    print(row("seconds, median (least to most)", "before", "after", "after / before"))
    for name in rows[0][0]:
        before, after = zip(*((a[name], b[name]) for a, b in rows), strict=True)
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        print(row(name, *map(spread, (before, after, ratios))))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def times_of(tree: Path, model: Path) -> dict[str, float]:
    """Seconds of each figure, once."""
    with tempfile.TemporaryDirectory(prefix="same_as-") as programs:
        flags = ["--devices", "8", "--image-size", "256", "--model", model, "--output", Path(programs) / "image.png"]

        def example() -> None:
            run(tree, tree / "examples" / "generate.py", *flags, JAX_COMPILATION_CACHE_DIR=programs)

        return {
            "start-up: import, load": seconds(lambda: start_up(tree, model)),
            "generate.py, first run": seconds(example),
            "generate.py, second run": seconds(example),
            "UNet call, 512x512, 1 device": float(worker(tree, "unet call", model)),
        }


def start_up(tree: Path, model: Path) -> None:
    run(tree, "-c", "import sys; from distrijax import *; load_pipeline(sys.argv[1], DistriConfig(devices=1))", model)


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


FEW, MANY = 2, 22
"""Steps of two calls that differ in nothing else."""


def time_unet_call(model: str, calls: int = 5) -> None:
    """In a worker: prints what a step more takes, guidance's two branches as one batch; the median of several calls."""
    from distrijax import DistriConfig, load_pipeline

    check_package()
    pipe = load_pipeline(model, DistriConfig(devices=1))
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 512, "width": 512, "chunk_size": None, "output_type": "latent"}

    def loop(steps: int) -> None:
        np.asarray(pipe(PROMPT, num_inference_steps=steps, **call).images)

    taken: dict[int, list[float]] = {FEW: [], MANY: []}
    for number in range(calls + 1):
        for steps, times in taken.items():
            times.append(seconds(lambda steps=steps: loop(steps)))
            if not number:
                times.clear()  # it compiled
    print((statistics.median(taken[MANY]) - statistics.median(taken[FEW])) / (MANY - FEW))


WORKER = "--worker"
WORKERS = {"images": write_images, "unet call": time_unet_call}
"""What this script does in a process with a revision's package."""


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        WORKERS[sys.argv[2]](*sys.argv[3:])
    else:
        main()
