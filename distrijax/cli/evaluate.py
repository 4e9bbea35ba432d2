"""Measures how close the images of each parallel setting are to those of one device.

    distrijax evaluate --output evaluation

Generates an image of every prompt on one device and in every setting of a grid, with the prompt's index as its seed. Writes into
--output: the images; fidelity.csv, a row for each setting (PSNR, SSIM, LPIPS, FID, bytes exchanged); plot.png, PSNR against
bytes; sheet.png, images with their errors. Prints the table in Markdown. An interrupted run resumes where it stopped, and
further settings may be added to a folder. LPIPS and FID need the extra `eval` and download their networks; without them the
other figures are still computed. `--coco FOLDER` is the paper's protocol (DistriFusion, arXiv 2402.19481): 5,000 captions of
COCO 2014, and FID against its real images too.
"""

from __future__ import annotations

import argparse
import enum
import gc
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from distrijax import SCHEDULERS, DistriConfig, Parallelism, load_pipeline, plan_mesh
from distrijax.atomic_write import atomic_write
from distrijax.cli.compile_cache import keep_compiled_programs
from distrijax.cli.fidelity import figures
from distrijax.cli.fidelity.grid import AXES, Axis, Setting, label, settings, text
from distrijax.cli.fidelity.metrics import NOT_AVAILABLE, Fid, Lpips, OptionalMetric, compare
from distrijax.cli.fidelity.prompts import Prompts, coco_prompts, file_prompts, scene_prompts
from distrijax.cli.fidelity.results import Results
from distrijax.cli.fidelity.versions import version_of
from distrijax.cli.options import (
    Parser,
    add_model_flags,
    check_positive,
    find_devices,
    find_dtype,
    open_model,
    plain_errors,
)
from distrijax.config import StepKind
from distrijax.models.families import default_size
from distrijax.pipelines.call import to_pil
from distrijax.pipelines.loading import Configs, read_configs
from distrijax.plan.traffic import traffic
from distrijax.sampling.layouts import image_layout
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.dtypes import DTYPES

SHEET_PROMPTS = 4  # on the contact sheet


class Job(NamedTuple):
    """What all settings have in common.

    Attributes:
        model: The checkpoint.
        name: Its name in the results.
        additions: What goes on top of it, for the results.
        versions: The versions of its files and folders, for the results.
        configs: Its configurations.
        loading: Keyword arguments of `load_pipeline`.
        call: Keyword arguments of the pipeline's calls.
        prompts: The prompts.
        batch: Prompts of one call.
    """

    model: Checkpoint
    name: str
    additions: dict[str, Any]
    versions: dict[str, str]
    configs: Configs
    loading: dict[str, Any]
    call: dict[str, Any]
    prompts: Prompts
    batch: int


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Flags; those of the process unless given.

    Raises:
        SystemExit: For wrong input, with a code other than 0 and one line on stderr.
    """
    arguments = parse(argv)
    with plain_errors():
        evaluate(arguments)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags: one with several values for each axis of the grid, and those that all settings share.

    Args:
        argv: Flags; those of the process for None.

    Raises:
        SystemExit: For wrong flags.
    """
    parser = Parser(__doc__)
    add = parser.add_argument
    for axis in AXES:
        _add_axis(parser, axis)
    add_model_flags(parser)
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on accelerators, float32 on CPUs)")
    add("--scheduler", choices=tuple(SCHEDULERS), default="ddim", help="(default: %(default)s)")
    add("--num-inference-steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    add("--guidance-scale", type=float, default=5.0, help="how closely images follow the prompt (default: %(default)s)")
    add("--image-size", type=int, nargs="+", metavar=("H", "W"), help="pixels (default: the model's)")
    add("--captions", type=int, help="number of prompts (default: 64, all of --prompts, or 5000 of --coco)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text file, a prompt on each line (default: captions of scenes)",
    )
    source.add_argument("--coco", type=Path, metavar="FOLDER", help="COCO 2014: annotations/, and val2014/ if present")
    add("--batch", type=int, default=8, help="prompts of one call of the pipeline (default: %(default)s)")
    add("--output", type=Path, default=Path("evaluation"), help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.image_size = parser.size(arguments.image_size)
    if min(arguments.devices) < 2:
        parser.error(
            f"--devices is {min(arguments.devices)}; images of one device are always generated, so give 2 or more"
        )
    return arguments


def _add_axis(parser: Parser, axis: Axis) -> None:
    """Adds the flag of an axis: several values, or --name and --no-name."""
    flag, kind = "--" + axis.field.replace("_", "-"), axis.kind
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=axis.values[0], help=axis.help)
        return
    choices = tuple(member.value for member in kind) if issubclass(kind, enum.StrEnum) else None
    accepted = {"choices": choices} if choices else {"type": axis.read or kind}
    help = f"{axis.help} (default: {' '.join(map(text, axis.values))})"
    parser.add_argument(flag, nargs="*" if axis.bare else "+", default=axis.values, help=help, **accepted)


def evaluate(arguments: argparse.Namespace) -> None:
    """Generates and measures what the folder lacks; then writes plot and sheet, and prints the table.

    Args:
        arguments: Of `parse`.

    Raises:
        DistriError: For wrong input, before anything is generated.
    """
    check_positive(arguments, "num_inference_steps", "batch", "captions")
    prompts = _read_prompts(arguments)
    keep_compiled_programs()
    find_devices(max(arguments.devices))
    job = read_job(arguments, prompts)
    chosen = {axis.field: getattr(arguments, axis.field) for axis in AXES}
    grid = settings({field: value if isinstance(value, tuple | list) else (value,) for field, value in chosen.items()})
    for setting in grid:
        check(setting, job)
    results = Results(arguments.output, _common(job))
    _fill(results, grid, job)
    _show(results, arguments, len(prompts.texts))


def _fill(results: Results, grid: Sequence[Setting], job: Job) -> None:
    """Generates the images and adds the rows that the results lack."""
    count = len(job.prompts.texts)
    lpips, fid = OptionalMetric(Lpips), OptionalMetric(Fid)
    real = results.link_real(job.prompts.images) if job.prompts.images else None
    missing = [list(results.missing(setting, count, job.batch)) for setting in grid]
    with tqdm(total=sum(map(len, itertools.chain(*missing))), unit="image", disable=None) as progress:
        for setting, batches in zip(grid, missing, strict=True):
            progress.set_description(f"{label(setting) or 'one device'} on {setting['devices']}")
            if batches:
                _generate_images(setting, job, batches, results, progress)
            old = None if batches else results.row(setting)
            if old is None or _lacks(old, {"lpips": lpips, "fid": fid}):
                known = cost(setting, job) if old is None else old
                results.add(setting, {**known, **_measure(results, setting, lpips, fid, real)})


def _read_prompts(arguments: argparse.Namespace) -> Prompts:
    """The prompts that the flags choose."""
    if arguments.coco:
        return coco_prompts(arguments.coco, arguments.captions or 5000)
    if arguments.prompts:
        return file_prompts(arguments.prompts, arguments.captions)
    return scene_prompts(arguments.captions or 64)


def read_job(arguments: argparse.Namespace, prompts: Prompts) -> Job:
    """What all settings share; reads configurations but no weights.

    Args:
        arguments: Of `parse`.
        prompts: The prompts that they choose.

    Raises:
        DistriError: The checkpoint cannot be found, or its configurations cannot be used.
    """
    recipe, checkpoint = open_model(arguments)
    path = Path(recipe.source)
    name = str(path.absolute() if path.exists() else path) if arguments.model else "embedded"
    configs = read_configs(checkpoint, arguments.scheduler)
    height, width = arguments.image_size or default_size(configs.family, configs.unet, configs.vae)
    call = {
        "height": height,
        "width": width,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
    }
    loading = {"scheduler": arguments.scheduler, "dtype": find_dtype(arguments.dtype)}
    found = {what: path for what, path in checkpoint.found.items() if what != "model" or arguments.model}
    return Job(
        model=checkpoint,
        name=name,
        additions=recipe.additions,
        versions={f"version of {what}": version_of(path) for what, path in found.items()},
        configs=configs,
        loading=loading,
        call=call,
        prompts=prompts,
        batch=min(arguments.batch, len(prompts.texts)),
    )


def _common(job: Job) -> dict[str, Any]:
    """What all rows of a folder of results were made with."""
    return {
        "model": job.name,
        **job.additions,
        **job.versions,
        **job.loading,
        "dtype": job.loading["dtype"].name,
        **job.call,
        "prompts": job.prompts.texts,
    }


def check(setting: Setting, job: Job) -> int:
    """Number of patches of an image.

    Args:
        setting: A setting of the grid.
        job: What all settings share.

    Raises:
        InvalidArgument: Before anything is generated, for an invalid setting.
    """
    config = DistriConfig(**setting)
    size, guided = (job.call["height"], job.call["width"]), job.call["guidance_scale"] > 1
    mesh = plan_mesh(config, config.device_count, branches=job.configs.unet.branches).abstract()
    return image_layout(config, mesh, job.configs.unet, job.configs.vae, size, guided=guided).patches


def cost(setting: Setting, job: Job) -> dict[str, Any]:
    """Bytes that a setting exchanges for one image, and whether it is lossless: equal up to float rounding.

    Args:
        setting: A setting of the grid.
        job: What all settings share.
    """
    config, vae_scale = DistriConfig(**setting), job.configs.vae.scale
    planned = traffic(
        config,
        job.configs.unet,
        job.configs.scheduler,
        devices=config.device_count,
        latent=(job.call["height"] // vae_scale, job.call["width"] // vae_scale),
        guided=job.call["guidance_scale"] > 1,
        dtype=job.loading["dtype"],
    )
    independent = config.parallelism == Parallelism.NAIVE_PATCH and check(setting, job) > 1
    steps = len(job.configs.scheduler.schedule(job.call["num_inference_steps"])[0].timestep)
    displaced = bool(planned.stale) and StepKind.DISPLACED in config.step_kinds(steps)
    return {
        "exactness": "lossy" if independent or displaced else "lossless",
        "received_bytes": sum(planned.received.values()),
        "stale_bytes": sum(planned.stale.values()),
    }


def _generate_images(setting: Setting, job: Job, batches: Sequence[range], results: Results, progress: tqdm) -> None:
    """Generates batches of images in one setting; the last batch repeats its prompts, so all use one program."""
    pipe = load_pipeline(job.model, DistriConfig(**setting), **job.loading)
    pipe.set_progress_bar_config(disable=True)  # `progress` counts the images of all settings
    for indices in batches:
        texts = [job.prompts.texts[index] for index in indices]
        padded = (texts * job.batch)[: job.batch]
        seeds = [indices.start + offset for offset in range(job.batch)]
        images = pipe(padded, **job.call, seed=seeds, output_type="np", chunk_size=None).images
        for index, image in zip(indices, to_pil(images), strict=False):
            results.save(setting, index, image)
        progress.update(len(indices))
    del pipe
    gc.collect()  # frees these weights before the next setting's are loaded


def _measure(
    results: Results, setting: Setting, lpips: OptionalMetric, fid: OptionalMetric, real: Path | None
) -> dict[str, Any]:
    """The figures of a setting's images."""
    images, reference = results.images(setting), results.reference
    psnr, ssim = compare(images, reference)
    return {
        "psnr": psnr,
        "ssim": ssim,
        "lpips": lpips(images, reference),
        "fid": fid(images, reference),
        "fid_real": fid(images, real) if real else "",
    }


def _lacks(row: Mapping[str, str], metrics: Mapping[str, OptionalMetric]) -> bool:
    """Whether a row lacks a metric that is available now."""
    return any(metric.available and row[column] == NOT_AVAILABLE for column, metric in metrics.items())


def _show(results: Results, arguments: argparse.Namespace, prompts: int) -> None:
    """Writes plot and sheet, and prints the table."""
    with atomic_write(results.folder / "sheet.png") as beside:
        figures.contact_sheet(results, min(SHEET_PROMPTS, prompts)).save(beside, format="PNG")
    title = f"{prompts} prompts, {arguments.num_inference_steps} steps of {arguments.scheduler}"
    written = ["sheet.png"]
    try:
        with atomic_write(results.folder / "plot.png") as beside:
            figures.plot(results.rows, title).savefig(beside, format="png")
        written.insert(0, "plot.png")
    except ImportError as error:
        print(f"plot.png: {NOT_AVAILABLE} ({error}); install the extra `eval`", file=sys.stderr)
    print(f"{title}, guidance {arguments.guidance_scale:g}; PSNR, SSIM, LPIPS and FID against one device's images\n")
    print(figures.table(results.rows))
    print(f"\nwrote {results.table} and, beside it, {', '.join(written)} and the images")
