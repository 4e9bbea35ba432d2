"""Compiles a denoising step for GPUs or TPUs that this machine lacks, and reports memory, traffic and projected time.

    python -m distrijax.plan --gpu a100-sxm-80gb --devices 8 --image-size 3840
    python -m distrijax.plan --tpu v5e --devices 8 --image-size 1024

`distrijax plan` is the same command. Nothing runs, no weights are read, and no GPU or TPU is needed. The extra `plan` installs
the compiler for GPUs, which takes a minute or two; the extra `tpu` installs the compiler for TPUs, which takes longer.
"""

from __future__ import annotations

from distrijax.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()  # before imports that take seconds

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax

from distrijax.config import DistriConfig
from distrijax.convert.sources import open_checkpoint
from distrijax.errors import DistriError, InvalidArgument
from distrijax.flags import add_config_flags, add_large_flag, config_of
from distrijax.models.families import SDXL, default_size
from distrijax.models.unet_config import SDXL_BASE, UNetConfig
from distrijax.models.vae import SDXL_VAE, VAEConfig
from distrijax.parallel.layout import check_sizes
from distrijax.parallel.mesh import plan_mesh
from distrijax.pipelines.loading import read_configs
from distrijax.plan.overlap import HloProgram
from distrijax.plan.projection import (
    LINKS,
    CompiledStep,
    Event,
    compile_decoder,
    compile_kinds,
    compile_step,
    decoder_seconds,
    timeline,
    total_seconds,
    waiting_seconds,
)
from distrijax.plan.targets import GPUS, TPUS
from distrijax.plan.traffic import megabytes
from distrijax.sampling.large import deep_sizes, read_large
from distrijax.sampling.layouts import layout_of
from distrijax.sampling.steps import SizedKind
from distrijax.schedulers import Scheduler, load_scheduler
from distrijax.validate import check_file, positive
from distrijax.weights.dtypes import DTYPES


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Flags; those of the process unless given.

    Raises:
        SystemExit: For wrong input, with a code other than 0 and one line on stderr.
    """
    arguments = _parse(argv)
    jax.config.update("jax_platforms", "cpu")  # compile-only targets are no devices of this process
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)  # it warns where accelerators are missing
    try:
        _report(arguments)
    except DistriError as error:
        sys.exit(f"error: {error}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        sys.argv[0] if sys.argv[0] == "distrijax plan" else "python -m distrijax.plan",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpu", default="a100-sxm-80gb", help=f"GPU model: {', '.join(GPUS)} (default: %(default)s)")
    add("--tpu", choices=tuple(TPUS), help="TPU model; compile for TPUs instead of GPUs")
    add("--devices", type=int, default=8, help="number of devices (default: %(default)s)")
    add(
        "--image-size",
        type=int,
        nargs="+",
        default=[1024],
        metavar=("H", "W"),
        help="pixels; H alone is a square (default: 1024)",
    )
    add("--model", help="folder in the diffusers layout or hub id (default: Stable Diffusion XL's UNet)")
    add("--batch", type=int, default=1, help="images of a call (default: %(default)s)")
    add("--no-guidance", action="store_true", help="no guidance, as with --guidance-scale 1")
    add_config_flags(parser, without=("split_scheme",))
    add(
        "--num-inference-steps",
        type=int,
        help="project a whole image of so many steps too: compiles each kind of step, and counts decoding",
    )
    add_large_flag(parser, default="auto")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="(default: %(default)s)")
    add("--link", default="nvlink", help="nvlink, pcie, network, or GB/s received (default: %(default)s)")
    add("--no-baseline", action="store_true", help="skip compiling for one device, which the speed-up is compared with")
    add("--hlo", type=Path, metavar="FILE", help="write the scheduled HLO module")
    add("--timeline", type=Path, metavar="FILE", help="write a plot of the projected time line (PNG)")
    return parser.parse_args(argv)


def _report(arguments: argparse.Namespace) -> None:
    """Compiles and prints; one line for each subject."""
    devices = positive(arguments.devices, "--devices")
    link = _link(arguments.link)
    if arguments.tpu and (link or arguments.timeline or arguments.num_inference_steps is not None):
        raise InvalidArgument(
            "--link, --timeline and --num-inference-steps have no effect with --tpu; leave them out, or choose a --gpu"
        )
    _check_outputs(arguments)
    run = _read_request(arguments)
    step = _compile(run, arguments, devices)
    if arguments.hlo:
        _write(arguments.hlo, lambda path: path.write_text(step.program.hlo))
    if arguments.timeline:
        _draw(arguments.timeline, step, step.events(link), arguments)
    print(f"mesh     {step.mesh} of {step.target.name}, {arguments.dtype}")
    stages = ", ".join(f"{stage} {taken:.3g} s" for stage, taken in step.compiling.items())
    print(f"compiled {sum(step.compiling.values()):.3g} s: {stages}")
    print(
        f"memory   {_memory(step.memory)} of {megabytes(step.target.memory)} on each device in a step: {_kinds(step.memory)}"
    )
    decoder_memory, decoder = _decoding(run, arguments)
    decoding = {"weights of the UNet": step.memory["weights"], **decoder_memory}
    print(f"         {_memory(decoding)} while the image is decoded: {_kinds(decoding)}")
    print(f"work     {step.flops / 1e12:.3g} TFLOP on each device and step")
    print(f"received {megabytes(step.received)} by each device and step")
    for line in _overlap(step):
        print(f"         {line}")
    alone = _compile(run, arguments, 1) if devices > 1 and not arguments.no_baseline else None
    for line in _estimate(step, alone) if arguments.tpu else _projection(step, alone, link):
        print(f"projection  {line}")
    if arguments.num_inference_steps is not None:
        for line in _whole_image(run, arguments, decoder, link):
            print(line, flush=True)


def _whole_image(
    run: _Request, arguments: argparse.Namespace, decoder: HloProgram, link: float | None
) -> Iterator[str]:
    """Each kind of an image's steps, and all of them with decoding; compiles each kind."""
    total = most = 0.0
    kinds = compile_kinds(
        run.config, run.unet, run.scheduler, run.target, _sizes(run, arguments), **_shape(run, arguments)
    )
    for kind, count, step in kinds:
        seconds = total_seconds(step.events(link))
        total += count * seconds
        most = max(most, sum(step.memory.values()))
        yield (
            f"image    {count} x {_name(kind, run)}: projection {1e3 * seconds:.3g} ms, received "
            f"{megabytes(step.received)}, memory {_memory(step.memory)}"
        )
    decoding = decoder_seconds(decoder, GPUS[run.target], link)
    yield f"projection  {total:.3g} s for all steps and {decoding:.3g} s for decoding: {total + decoding:.3g} s an image"


def _name(kind: Any, run: _Request) -> str:
    """A kind of step as text, with the size of its deep part where that is smaller."""
    if not isinstance(kind, SizedKind):
        return str(kind)
    rows, columns = (side * run.vae.scale for side in kind.size)
    return f"{kind.kind}, the deep part at {rows}x{columns}"


def _sizes(run: _Request, arguments: argparse.Namespace) -> list[tuple[int, int] | None]:
    """Of each step of an image, the size of the deep part's map."""
    mesh = plan_mesh(run.config, arguments.devices, branches=run.unet.branches).abstract()
    layout = layout_of(run.config, mesh, run.unet, guided=not arguments.no_guidance, latent=run.latent)
    timesteps = run.scheduler.schedule(arguments.num_inference_steps)[0].timestep
    return deep_sizes(read_large(arguments.large, layout, run.trained), timesteps)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raises DistriError, before minutes of compiling, for outputs that cannot be written."""
    if arguments.timeline and find_spec("matplotlib") is None:
        raise InvalidArgument("--timeline needs matplotlib; install the extra `plan`")
    for flag, path in (("--hlo", arguments.hlo), ("--timeline", arguments.timeline)):
        if path and (path.is_dir() or not os.access(path, os.W_OK)):  # a device such as /dev/stdout is writable
            check_file(path, flag)


def _projection(step: CompiledStep, alone: CompiledStep | None, link: float | None) -> Iterator[str]:
    events = step.events(link)
    taken = total_seconds(events)
    yield f"{1e3 * taken:.3g} ms a step, {1e3 * waiting_seconds(events):.2g} ms of them waiting for transfers"
    if alone is not None:
        slower = total_seconds(alone.events(link))
        yield f"{1e3 * slower:.3g} ms a step on one device: {slower / taken:.2f} times as long"


def _estimate(step: CompiledStep, alone: CompiledStep | None) -> Iterator[str]:
    cycles = step.program.cycles()
    yield f"{cycles / 1e6:.3g} million cycles a step in kernels, by libtpu's own estimate; transfers not included"
    if alone is not None:
        more = alone.program.cycles()
        yield f"{more / 1e6:.3g} million cycles a step on one device: {more / cycles:.2f} times as many"


def _memory(kinds: dict[str, int]) -> str:
    return megabytes(sum(kinds.values()))


def _kinds(kinds: dict[str, int]) -> str:
    return ", ".join(f"{kind} {megabytes(size)}" for kind, size in kinds.items())


class _Request(NamedTuple):
    """What to compile, and for which target (`distrijax.plan.targets`)."""

    target: str
    config: DistriConfig
    unet: UNetConfig
    vae: VAEConfig
    scheduler: Scheduler
    latent: tuple[int, int]
    trained: tuple[int, int]


def _read_request(arguments: argparse.Namespace) -> _Request:
    if len(arguments.image_size) > 2:
        raise InvalidArgument(f"--image-size takes H or H W, not {len(arguments.image_size)} numbers")
    family, unet, vae = SDXL, SDXL_BASE, SDXL_VAE
    scheduler = load_scheduler({"_class_name": "EulerDiscreteScheduler"})
    if arguments.model:
        configs = read_configs(open_checkpoint(arguments.model, weights=False))
        family, unet, vae, scheduler = configs.family, configs.unet, configs.vae, configs.scheduler
    height, width = arguments.image_size[0], arguments.image_size[-1]
    check_sizes(height=height, width=width, vae_scale=vae.scale)
    config = config_of(arguments)
    latent, trained = (
        (rows // vae.scale, columns // vae.scale)
        for rows, columns in ((height, width), default_size(family, unet, vae))
    )
    return _Request(arguments.tpu or arguments.gpu, config, unet, vae, scheduler, latent, trained)


def _shape(run: _Request, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all that is compiled has in common."""
    return {
        "devices": arguments.devices,
        "latent": run.latent,
        "images": arguments.batch,
        "guided": not arguments.no_guidance,
        "dtype": DTYPES[arguments.dtype],
    }


def _compile(run: _Request, arguments: argparse.Namespace, devices: int) -> CompiledStep:
    positive(arguments.batch, "--batch")
    shape = _shape(run, arguments) | {"devices": devices}
    return compile_step(run.config, run.unet, run.scheduler, run.target, **shape)


def _decoding(run: _Request, arguments: argparse.Namespace) -> tuple[dict[str, int], HloProgram]:
    return compile_decoder(run.config, run.unet, run.vae, run.target, **_shape(run, arguments))


def _link(given: str) -> float | None:
    """Bytes per second received; None for the GPU's own link."""
    if given == "nvlink" or given in LINKS:
        return LINKS.get(given)
    try:
        rate = float(given)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise InvalidArgument(f"--link is {given!r}; use nvlink, {', '.join(LINKS)}, or GB/s")
    return rate * 1e9


def _overlap(step: CompiledStep) -> list[str]:
    """For each kind of collective how many overlap with matmuls; then the bytes of those that do not."""
    transfers = step.program.transfers
    lines = []
    for kind, count in sorted(Counter(transfer.kind for transfer in transfers).items()):
        matmuls = [len(transfer.hidden_by) for transfer in transfers if transfer.kind == kind and transfer.hidden_by]
        line = f"{len(matmuls)} of {count} {kind} asynchronous, with matmuls between start and done"
        lines.append(line + (f" ({min(matmuls)} to {max(matmuls)} of them)" if matmuls else ""))
    exposed = sorted(transfer.received for transfer in transfers if not transfer.hidden_by)
    if exposed:
        lines.append(f"not overlapped with matmuls: {', '.join(megabytes(size) for size in exposed)}")
    return lines


def _draw(path: Path, step: CompiledStep, events: list[Event], arguments: argparse.Namespace) -> None:
    size = "x".join(map(str, (arguments.image_size[0], arguments.image_size[-1])))
    title = f"projection: one step at {size}, {step.mesh} of {step.target.name}"
    figure = timeline(events, title)
    _write(path, lambda path: figure.savefig(path, format="png"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written ({error.strerror}); choose another file") from None


if __name__ == "__main__":
    main()
