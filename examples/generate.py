"""Paints a picture of a prompt, by displaced patch parallelism on as many devices as you name.

    python examples/generate.py --devices 8 --prompt "a small green star in the center, on a dotted pink background"

A machine without accelerators works on virtual CPU devices. The PNG carries the prompt, the seed and all settings in its text.
Compiled programs are kept in the user's cache folder, so that the second run is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's own log, which has nothing for a user

import jax
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from distrijax import (
    DEFAULT_MODEL,
    SCHEDULERS,
    DistriConfig,
    DistriError,
    DistriWarning,
    MeshPlan,
    Parallelism,
    SplitScheme,
    SyncMode,
    load_pipeline,
    plan_mesh,
)
from distrijax import plan as planning
from distrijax.denoise import layout_of
from distrijax.loading import DTYPES, Configs, default_size, find_folder, read_configs, resolve_dtype
from distrijax.mesh import check_images, check_sizes

PROMPT = "a large red circle at the top left and a small blue square on the right, on a striped yellow background"


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; raises SystemExit with a code other than 0, after one line on stderr, for wrong input."""
    arguments = parse(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", DistriWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            generate(arguments)
        except DistriError as error:
            sys.exit(f"error: {error}")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sys.exit(
                "error: the devices' memory does not suffice; use more devices, a smaller --image-size or bfloat16"
            )
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; where they have no default, the checkpoint or the machine decides."""
    summary, _, rest = __doc__.partition("\n")
    parser = Parser(description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", type=int, help="how many devices share the picture (default: all that JAX shows)")
    add("--prompt", default=PROMPT, help="what to paint (default: %(default)s)")
    add("--negative-prompt", help="what not to paint")
    add(
        "--image-size",
        type=int,
        nargs="+",
        metavar=("H", "W"),
        help="pixels; H alone is a square (default: the model's)",
    )
    add("--num-inference-steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    add("--guidance-scale", type=float, default=5.0, help="how closely to follow the prompt (default: %(default)s)")
    add("--scheduler", choices=tuple(SCHEDULERS), help="(default: the checkpoint's)")
    add("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    add("--warmup-steps", type=int, default=4, help="exact steps after the first (default: %(default)s)")
    modes = tuple(mode.value for mode in SyncMode)
    add("--sync-mode", choices=modes, default=modes[0], help="what devices exchange then (default: %(default)s)")
    parallelisms, schemes = ([member.value for member in kind] for kind in (Parallelism, SplitScheme))
    add("--parallelism", choices=parallelisms, default="patch", help="how the UNet is divided (default: %(default)s)")
    add("--split-scheme", choices=schemes, default="alternate", help="cuts of naive_patch (default: %(default)s)")
    add("--no-split-batch", action="store_true", help="give no half of the devices to each branch of the guidance")
    add(
        "--batch", type=int, default=1, help="pictures of the prompt: NAME-0.png, NAME-1.png ... (default: %(default)s)"
    )
    add(
        "--model",
        help="Stable Diffusion 1.x, 2.x or XL: a folder in the diffusers layout or a hub id (default: embedded)",
    )
    add("--variant", help="of the weight files, for example fp16")
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on accelerators, float32 on CPUs)")
    add("--plan", action="store_true", help="tell what devices would keep and exchange, load no weights, and stop")
    add("--output", type=Path, default=Path("distrijax.png"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    if len(arguments.image_size or ()) > 2:
        parser.error(f"--image-size takes H or H W, not {len(arguments.image_size)} numbers")
    if arguments.image_size:
        arguments.image_size = (arguments.image_size[0], arguments.image_size[-1])
    if arguments.batch < 1:
        parser.error(f"--batch is {arguments.batch}; give at least 1")
    return arguments


def generate(arguments: argparse.Namespace) -> None:
    """Loads, paints and writes; tells the plan, and how long each took."""
    config = DistriConfig(
        devices=arguments.devices,
        sync_mode=arguments.sync_mode,
        warmup_steps=arguments.warmup_steps,
        split_batch=not arguments.no_split_batch,
        parallelism=arguments.parallelism,
        split_scheme=arguments.split_scheme,
    )
    folder = find_folder(arguments.model or DEFAULT_MODEL, variant=arguments.variant, revision=None, token=None)
    configs = read_configs(folder, arguments.scheduler)
    size = arguments.image_size or default_size(configs.family, configs.unet, configs.vae)
    if arguments.plan:
        print_plan(arguments, config, configs, size)
        return
    outputs = output_files(arguments.output, arguments.batch)
    keep_compiled_programs()
    plan = plan_mesh(config, find_devices(config.devices))
    dtype = resolve_dtype(arguments.dtype, jax.devices()[0].platform)
    image = share(arguments, config, configs, size, plan)
    print(f"mesh     {plan} on {plan.devices} x {device_kind()}, {dtype.name}")
    print(f"image    {image}", flush=True)

    start = time.perf_counter()
    pipe = load_pipeline(folder, config, dtype=dtype, variant=arguments.variant, scheduler=arguments.scheduler)
    loaded = time.perf_counter()
    print(f"load     {loaded - start:.1f} s", flush=True)
    call = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "seed": arguments.seed,
        "height": size[0],
        "width": size[1],
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
    }
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: no bar where stderr is not a terminal
    pictures = pipe(**call, num_images_per_prompt=arguments.batch).images
    compiling = pipe.programs.seconds
    running = time.perf_counter() - loaded - compiling
    print(f"compile  {compiling:.1f} s for {pipe.programs.count} programs")
    print(f"run      {running:.1f} s for {arguments.num_inference_steps} steps, text encoders and decoder")

    settings = {
        **call,
        "scheduler": arguments.scheduler or pipe.scheduler.diffusers_name,
        "model": arguments.model or "embedded",
        "variant": arguments.variant,
        "dtype": dtype.name,
        "devices": plan.devices,
        "mesh": plan,
        "sync_mode": config.sync_mode.value,
        "warmup_steps": config.warmup_steps,
        "split_batch": config.split_batch,
        "parallelism": config.parallelism.value,
        "split_scheme": config.split_scheme.value,
        "software": software(),
    }
    for index, (picture, output) in enumerate(zip(pictures, outputs, strict=True)):
        write(picture, output, {**settings, "image": f"{index} of {arguments.batch}"})
        print(f"wrote    {output}")


def print_plan(arguments: argparse.Namespace, config: DistriConfig, configs: Configs, size: tuple[int, int]) -> None:
    """What a run would exchange, from the configurations alone; the devices need not be there."""
    found = find_devices(None)
    devices = config.devices or found
    dtype = resolve_dtype(arguments.dtype, jax.devices()[0].platform)
    mesh = plan_mesh(config, devices)
    image = share(arguments, config, configs, size, mesh)
    planned = planning.plan(
        config,
        configs.unet,
        configs.scheduler,
        devices=devices,
        latent=(size[0] // configs.vae.scale, size[1] // configs.vae.scale),
        images=arguments.batch,
        guided=arguments.guidance_scale > 1,
        dtype=dtype,
    )
    print(f"mesh     {mesh}, {dtype.name}\nimage    {image}\n{planned}")


def share(
    arguments: argparse.Namespace, config: DistriConfig, configs: Configs, size: tuple[int, int], mesh: MeshPlan
) -> str:
    """The picture, and the part of it that one device works on; raises DistriError where it cannot be shared out."""
    check_images(arguments.batch, mesh.data)
    check_sizes(height=size[0], width=size[1], vae_scale=configs.vae.scale)
    latent = size[0] // configs.vae.scale, size[1] // configs.vae.scale
    levels, guided = len(configs.unet.block_out_channels), arguments.guidance_scale > 1
    rows = layout_of(config, mesh.abstract(), guided=guided, latent=latent, levels=levels).bands.band
    several = f", {arguments.batch} of them" if arguments.batch > 1 else ""
    return (
        f"{size[0]}x{size[1]}{several}; each device has {rows * configs.vae.scale} rows of pixels, {rows} of the latent"
    )


def output_files(output: Path, batch: int) -> list[Path]:
    """One file for each picture; raises DistriError, before anything is loaded, where they could not be written."""
    if output.suffix.lower() != ".png":
        raise DistriError(f"--output is {output}; give a name that ends in .png")
    names = [output.name] if batch == 1 else [f"{output.stem}-{index}{output.suffix}" for index in range(batch)]
    outputs = [output.with_name(name) for name in names]
    for path in outputs:
        if path.is_dir():
            raise DistriError(f"--output {path} is a folder; give the name of a file")
    try:
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise DistriError(f"--output {output} cannot be written ({error.strerror}); choose another folder") from None
    return outputs


def keep_compiled_programs() -> None:
    """Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or else in the user's cache folder, however quick they were."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrijax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def find_devices(wanted: int | None) -> int:
    """How many devices to use. Raises DistriError where there are fewer accelerators than `wanted`.

    A machine without accelerators gets as many virtual CPU devices; accelerators do not care for that setting, which must be
    made before the first look at them.
    """
    if wanted is not None:
        with contextlib.suppress(RuntimeError):  # JAX has been used in this process, and its devices are what they are
            jax.config.update("jax_num_cpu_devices", wanted)
    try:
        found = len(jax.devices())
    except (RuntimeError, AssertionError):
        platforms = os.environ.get("JAX_PLATFORMS")
        raise DistriError(
            f"JAX finds no device with JAX_PLATFORMS={platforms}; set it otherwise or not at all"
        ) from None
    if wanted is not None and wanted > found:
        raise DistriError(
            f"--devices is {wanted} and this machine shows {found} ({device_kind()}); use --devices {found} or fewer"
        )
    return wanted or found


def device_kind() -> str:
    """What the devices are, for people."""
    device = jax.devices()[0]
    return "virtual CPU" if device.platform == "cpu" else device.device_kind


def software() -> str:
    """This package and its version, where it is installed."""
    try:
        return f"distrijax {version('distrijax')}"
    except PackageNotFoundError:
        return "distrijax"


def write(picture: Image, output: Path, settings: dict[str, Any]) -> None:
    """A PNG with its settings as text, written beside and renamed, so that no half of it is ever seen."""
    text = PngInfo()
    for name, value in settings.items():
        if value is not None:
            text.add_text(name, str(value))
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        picture.save(beside, format="PNG", pnginfo=text)
        beside.replace(output)
    except OSError as error:
        raise DistriError(
            f"{output} could not be written ({error.strerror}); make room or choose another --output"
        ) from None
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
