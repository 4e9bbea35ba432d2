"""Generates an image from a prompt with displaced patch parallelism on the given number of devices.

    distrijax generate --devices 8 --prompt "a small green star in the center, on a dotted pink background"

A machine without accelerators uses virtual CPU devices. The PNG's text chunks hold the prompt, the seed and all settings.
Compiled programs are kept in the user's cache folder, so the second run starts quickly.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from distrijax import (
    SCHEDULERS,
    DistriConfig,
    MeshPlan,
    Parallelism,
    SplitScheme,
    __version__,
    load_pipeline,
    plan_mesh,
)
from distrijax.atomic_write import atomic_write
from distrijax.cli.compile_cache import keep_compiled_programs
from distrijax.cli.multiprocess import add_process_flags, fail_together, join
from distrijax.cli.options import (
    Parser,
    add_model_flags,
    device_kind,
    find_devices,
    find_dtype,
    open_model,
    plain_errors,
)
from distrijax.errors import InvalidArgument
from distrijax.flags import add_config_flags, add_large_flag, config_of, settings_of
from distrijax.models.families import default_size
from distrijax.parallel.layout import Layout, check_images
from distrijax.parallel.mesh import CFG
from distrijax.parallel.processes import is_main_process
from distrijax.pipelines.build import Pipeline
from distrijax.pipelines.loading import Configs, read_configs
from distrijax.plan.traffic import traffic
from distrijax.sampling.large import deep_sizes, read_large
from distrijax.sampling.layouts import image_layout
from distrijax.validate import check_file
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.dtypes import DTYPES

PROMPT = (
    "a large blue star at the top left and a large red triangle at the bottom right, on a striped yellow background"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Flags; those of the process unless given.

    Raises:
        SystemExit: For wrong input, with a code other than 0 and one line on stderr.
    """
    arguments = parse(argv)
    with fail_together(), plain_errors():
        if not arguments.plan:
            join(arguments, arguments.devices)
        generate(arguments)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags; the checkpoint or the machine decides where a flag has no default."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--devices", type=int, help="number of devices (default: all that JAX finds)")
    add("--prompt", default=PROMPT, help="what the image shows (default: %(default)s)")
    add("--negative-prompt", help="what the image should not show")
    add(
        "--image-size",
        type=int,
        nargs="+",
        metavar=("H", "W"),
        help="pixels; H alone is a square (default: the model's)",
    )
    add("--num-inference-steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    add(
        "--guidance-scale",
        type=float,
        default=5.0,
        help="how closely the image follows the prompt (default: %(default)s)",
    )
    add_large_flag(parser, default="auto")
    add("--scheduler", choices=tuple(SCHEDULERS), help="(default: the checkpoint's)")
    parser.add_values(
        "--scheduler-option", "an option that replaces the checkpoint's, such as timestep_spacing=trailing"
    )
    add("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    add_config_flags(parser)
    add("--batch", type=int, default=1, help="number of images: NAME-0.png, NAME-1.png ... (default: %(default)s)")
    add_model_flags(parser)
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on accelerators, float32 on CPUs)")
    parser.add_values("--compiler-option", "an XLA option that replaces this project's")
    add_process_flags(parser)
    add(
        "--plan",
        action="store_true",
        help="print what each device would keep and exchange, without loading weights, and exit",
    )
    add("--output", type=Path, default=Path("distrijax.png"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.image_size = parser.size(arguments.image_size)
    if arguments.batch < 1:
        parser.error(f"--batch is {arguments.batch}; give at least 1")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed is {arguments.seed}; give a whole number from 0 to 2**63 - 1")
    return arguments


def generate(arguments: argparse.Namespace) -> None:
    """Loads the model, generates and writes the images; prints the plan and the time of each stage.

    Args:
        arguments: The parsed flags.
    """
    config = config_of(arguments, devices=arguments.devices)
    if arguments.plan:
        print_plan(arguments, config)
        return
    recipe, checkpoint = open_model(arguments)
    configs, size = configurations(arguments, checkpoint)
    outputs = output_files(arguments.output, arguments.batch) if is_main_process() else []
    keep_compiled_programs()
    plan = plan_mesh(config, find_devices(config.device_count), branches=configs.unet.branches)
    dtype = find_dtype(arguments.dtype)
    layout = plan_layout(arguments, config, configs, size, plan)
    print(f"mesh     {call_mesh(plan, layout)} on {plan.devices} x {device_kind()}, {dtype.name}")
    print(f"image    {describe_image(layout, arguments.batch, configs.vae.scale)}", flush=True)
    if shrunk := describe_large(arguments, configs, layout):
        print(f"large    {shrunk}", flush=True)

    call = call_arguments(arguments, size)
    start = time.perf_counter()
    pipe = load_pipeline(
        checkpoint,
        config,
        dtype=dtype,
        scheduler=arguments.scheduler,
        scheduler_options=arguments.scheduler_option,
        compiler_options=arguments.compiler_option,
        compile_for={**call, "num_images_per_prompt": arguments.batch},
    )
    print(f"load     {time.perf_counter() - start:.1f} s, while programs compile", flush=True)
    images = run_call(pipe, call, arguments)
    settings = {
        **call,
        "scheduler": arguments.scheduler or pipe.scheduler.diffusers_name,
        "scheduler_options": json.dumps(arguments.scheduler_option) if arguments.scheduler_option else None,
        "model": arguments.model or "embedded",
        **recipe.additions,
        "dtype": dtype.name,
        "devices": plan.devices,
        "mesh": call_mesh(plan, layout),
        **settings_of(config),
        "sync_steps": " ".join(map(str, config.sync_steps)) or None,
        "software": f"distrijax {__version__}",
    }
    for index, (image, output) in enumerate(zip(images, outputs, strict=is_main_process())):
        write(image, output, {**settings, "image": f"{index} of {arguments.batch}"})
        print(f"wrote    {output}")


def call_arguments(arguments: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call, without the number of images.

    Args:
        arguments: The parsed flags.
        size: Height and width in pixels.
    """
    return {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "seed": arguments.seed,
        "height": size[0],
        "width": size[1],
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "large": arguments.large,
    }


def run_call(pipe: Pipeline, call: dict[str, Any], arguments: argparse.Namespace) -> list[Image]:
    """Calls the pipeline, and prints how long it compiled and ran.

    Args:
        pipe: The pipeline.
        call: Keyword arguments of its call.
        arguments: The parsed flags.
    """
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: no bar unless stderr is a terminal
    start = time.perf_counter()
    images = pipe(**call, num_images_per_prompt=arguments.batch).images
    waited = pipe.programs.blocked_seconds
    running = time.perf_counter() - start - waited
    print(f"compile  {waited:.1f} s more for {pipe.programs.count} programs")
    steps = f"{arguments.num_inference_steps} step{'s' if arguments.num_inference_steps > 1 else ''}"
    print(f"run      {running:.1f} s for {steps}, text encoders and decoder")
    return images


def configurations(arguments: argparse.Namespace, checkpoint: Checkpoint) -> tuple[Configs, tuple[int, int]]:
    """The configurations of a checkpoint, and height and width of the image in pixels."""
    configs = read_configs(checkpoint, arguments.scheduler, arguments.scheduler_option)
    return configs, arguments.image_size or default_size(configs.family, configs.unet, configs.vae)


def print_plan(arguments: argparse.Namespace, config: DistriConfig) -> None:
    """Prints what a run would exchange, from the configurations alone; the devices need not exist."""
    configs, size = configurations(arguments, open_model(arguments, weights=False)[1])
    found = find_devices(None)
    devices = config.device_count or found
    dtype = find_dtype(arguments.dtype)
    mesh = plan_mesh(config, devices, branches=configs.unet.branches)
    layout = plan_layout(arguments, config, configs, size, mesh)
    planned = traffic(
        config,
        configs.unet,
        configs.scheduler,
        devices=devices,
        latent=(size[0] // configs.vae.scale, size[1] // configs.vae.scale),
        images=arguments.batch,
        guided=arguments.guidance_scale > 1,
        dtype=dtype,
    )
    print(f"mesh     {call_mesh(mesh, layout)}, {dtype.name}")
    print(f"image    {describe_image(layout, arguments.batch, configs.vae.scale)}\n{planned}")


def plan_layout(
    arguments: argparse.Namespace, config: DistriConfig, configs: Configs, size: tuple[int, int], mesh: MeshPlan
) -> Layout:
    """How the image is sharded over the devices; raises DistriError for sizes that cannot be divided."""
    check_images(arguments.batch, mesh.data)
    guided = arguments.guidance_scale > 1
    return image_layout(config, mesh.abstract(), configs.unet, configs.vae, size, guided=guided)


def call_mesh(mesh: MeshPlan, layout: Layout) -> MeshPlan:
    """The axes as the call uses them: without guidance, rows are sharded over `cfg` as over `patch`."""
    return MeshPlan(mesh.data, 1, layout.patches) if CFG in layout.rows else mesh


def describe_image(layout: Layout, batch: int, scale: int) -> str:
    """Describes the image's size, one device's part of it, and the padding.

    Args:
        layout: How the image is sharded.
        batch: Number of images.
        scale: Pixels for each row of the latent.
    """
    sides = {name: (layout.latent[axis], layout.padded_shape[axis]) for axis, name in enumerate(("rows", "columns"))}
    scheme = layout.split_scheme if layout.parallelism is Parallelism.NAIVE_PATCH else SplitScheme.ROW
    cut = {SplitScheme.ROW: ["rows"], SplitScheme.COLUMN: ["columns"]}.get(scheme, list(sides))
    bands = [(name, sides[name][1] // layout.patches) for name in cut]
    each = " and, in turn, ".join(f"{band * scale} {name} of pixels, {band} of the latent" for name, band in bands)
    added = {name: (whole - own, whole) for name, (own, whole) in sides.items() if whole > own}
    padding = " and ".join(f"{more * scale} of {whole * scale} {name}" for name, (more, whole) in added.items())
    size = "x".join(str(own * scale) for own, _ in sides.values())
    several = f", {batch} of them" if batch > 1 else ""
    return f"{size}{several}; each device has {each}{f'; {padding} are padding' if padding else ''}"


def describe_large(arguments: argparse.Namespace, configs: Configs, layout: Layout) -> str:
    """Describes the steps whose deep part runs on a smaller map; empty if there are none.

    Args:
        arguments: The parsed flags.
        configs: The model's.
        layout: How the image is sharded.
    """
    height, width = default_size(configs.family, configs.unet, configs.vae)
    trained = height // configs.vae.scale, width // configs.vae.scale
    timesteps = configs.scheduler.schedule(arguments.num_inference_steps)[0].timestep
    sizes = deep_sizes(read_large(arguments.large, layout, trained), timesteps)
    small = [(count, size) for size, count in Counter(sizes).items() if size is not None]
    if not small:
        return ""
    parts = [f"{count} at {rows * configs.vae.scale}x{columns * configs.vae.scale}" for count, (rows, columns) in small]
    return f"the model was trained at {height}x{width}: of {len(sizes)} steps the deep part makes {', '.join(parts)}"


def output_files(output: Path, batch: int) -> list[Path]:
    """One file for each image.

    Args:
        output: The path of --output.
        batch: Number of images.

    Raises:
        InvalidArgument: Before anything is loaded, for files that cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise InvalidArgument(f"--output is {output}; give a name that ends in .png")
    names = [output.name] if batch == 1 else [f"{output.stem}-{index}{output.suffix}" for index in range(batch)]
    outputs = [output.with_name(name) for name in names]
    for path in outputs:
        check_file(path, "--output")
    return outputs


def write(image: Image, output: Path, settings: dict[str, Any]) -> None:
    """Writes a PNG with its settings as text chunks, atomically.

    Args:
        image: The image.
        output: The PNG's path.
        settings: Text chunks by name.
    """
    text = PngInfo()
    for name, value in settings.items():
        if value is not None:
            text.add_text(name, str(value))
    with atomic_write(output) as beside:
        image.save(beside, format="PNG", pnginfo=text)
