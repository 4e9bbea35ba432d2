"""Projected cost of a step on GPUs or TPUs that this machine lacks: XLA compiles it for them, a stated model times it.

Memory, bytes, operations and communication/compute overlap are those of the compiled program. For TPUs libtpu itself
estimates the cycles of each kernel. For GPUs times are projections of a simple model:

    matmul      its operations at MATMUL_EFFICIENCY of the GPU's peak, or its bytes at MEMORY_EFFICIENCY of the bandwidth,
                whichever takes longer; "matmul" includes convolutions and attention
    other       its bytes at MEMORY_EFFICIENCY of the bandwidth
    kernel      LAUNCH_SECONDS in addition
    transfer    LINK_LATENCY, and its bytes at LINK_EFFICIENCY of the link; one after the other, in parallel with the kernels

Kernels wait for a transfer only at its done. MATMUL_EFFICIENCY was chosen so that one A100 takes about as long for SDXL's
UNet at 3840x3840 as the original's authors measured (2.8 s, arXiv 2402.19481); the others are common values. None was
measured here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from distrijax.config import DistriConfig
from distrijax.models.layers import abstract
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.parallel.mesh import MeshPlan, plan_mesh
from distrijax.parallel.programs import compiled, options_for
from distrijax.parallel.stages import Described, with_shardings
from distrijax.plan.overlap import HloProgram, Instruction, Transfer, array_bytes
from distrijax.plan.targets import GPUS, TPUS, Gpu, Tpu, compile_only_devices
from distrijax.plan.traffic import main_step, stale_of, step_kinds
from distrijax.sampling.decode import DECODE, DecodeSpec
from distrijax.sampling.layouts import layout_of
from distrijax.schedulers import Scheduler
from distrijax.weights.sharding import Model, ModelLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, LINK_EFFICIENCY = 0.6, 0.8, 0.7
LAUNCH_SECONDS, LINK_LATENCY = 3e-6, 15e-6  # seconds

LINKS = {"pcie": 32e9, "network": 25e9}
"""Bytes per second received over links other than NVLink: PCIe 4.0 x16; 200 Gbit/s for each GPU between hosts."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel or a transfer on the projected time line.

    Attributes:
        name: Name of the HLO instruction, or kind of the collective.
        start: Seconds.
        end: Seconds.
        matmul: Whether a kernel contains a matmul, a convolution or attention.
        transfer: Whether this is a transfer.
    """

    name: str
    start: float
    end: float
    matmul: bool = False
    transfer: bool = False


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A run's main step, compiled for a compile-only target.

    Attributes:
        target: The device model.
        mesh: Sizes of the mesh axes.
        program: The scheduled HLO module.
        memory: Bytes on each device, by kind: weights, stale state, latents and conditioning, gathered (the most bytes of
            gather results that are alive at once), and work (the program's other temporaries).
        compiling: Seconds of each compilation stage on this machine. Tracing includes the synchronous step, whose results
            the displaced step takes.
    """

    target: Gpu | Tpu
    mesh: MeshPlan
    program: HloProgram
    memory: dict[str, int]
    compiling: dict[str, float]

    @property
    def flops(self) -> int:
        """Floating-point operations of one device's matmuls."""
        return sum(map(self.program.flops, self.program.step))

    @property
    def received(self) -> int:
        """Bytes that one device receives."""
        return sum(transfer.received for transfer in self.program.transfers)

    def events(self, link: float | None = None) -> list[Event]:
        """The projected time line on GPUs.

        Args:
            link: Bytes per second received; None is the GPU's own link.
        """
        return _simulate(self.program, self.target, link or self.target.link)


def compile_step(
    config: DistriConfig,
    unet: UNetConfig,
    scheduler: Scheduler,
    target: str,
    *,
    devices: int,
    latent: tuple[int, int],
    images: int = 1,
    guided: bool = True,
    dtype: Any = jnp.bfloat16,
    options: dict[str, Any] | None = None,
) -> CompiledStep:
    """Compiles a run's main step for a compile-only target.

    Args:
        config: The run's configuration.
        unet: The UNet's configuration.
        scheduler: The run's scheduler.
        target: A key of `distrijax.plan.targets.GPUS` or `TPUS`.
        devices: Number of devices.
        latent: Height and width of the latent.
        images: Images of a call.
        guided: Whether the guidance scale is above 1.
        dtype: Of the weights and activations.
        options: XLA options that override the pipeline's.

    Raises:
        InvalidArgument: For sizes that cannot be divided among the devices, and where the compiler for the target is not
            installed.
    """
    mesh, targets = plan_mesh(config, devices, branches=unet.branches), compile_only_devices(target, devices)
    start = time.perf_counter()
    step = main_step(
        config,
        unet,
        scheduler,
        mesh,
        latent=latent,
        images=images,
        guided=guided,
        dtype=dtype,
        devices=targets,
    )
    return _compile_step(step, target, mesh, config, options, time.perf_counter() - start)


def compile_kinds(
    config: DistriConfig,
    unet: UNetConfig,
    scheduler: Scheduler,
    target: str,
    sizes: Sequence[tuple[int, int] | None],
    *,
    devices: int,
    latent: tuple[int, int],
    images: int = 1,
    guided: bool = True,
    dtype: Any = jnp.bfloat16,
) -> Iterator[tuple[Hashable, int, CompiledStep]]:
    """Compiles a step of each kind that a run has; arguments as in `compile_step`, except `sizes`.

    Args:
        config: The run's configuration.
        unet: The UNet's configuration.
        scheduler: The run's scheduler.
        target: A key of `distrijax.plan.targets.GPUS` or `TPUS`.
        sizes: Of each step, the size of the deep part's map; None for that of the latents.
        devices: Number of devices.
        latent: Height and width of the latent.
        images: Images of a call.
        guided: Whether the guidance scale is above 1.
        dtype: Of the weights and activations.

    Yields:
        Each kind, how many steps are of it, and the step.
    """
    mesh, targets = plan_mesh(config, devices, branches=unet.branches), compile_only_devices(target, devices)
    shape = {"latent": latent, "images": images, "guided": guided, "dtype": dtype, "platform": targets[0].platform}
    plan, described = step_kinds(config, unet, scheduler, mesh.build(targets), sizes, **shape)
    for kind, count in Counter(plan.kinds).items():
        yield kind, count, _compile_step(described[kind], target, mesh, config, None, 0.0)


def _compile_step(
    step: Described, target: str, mesh: MeshPlan, config: DistriConfig, options: Any, tracing: float
) -> CompiledStep:
    """Compiles a step; `tracing` is what describing it took, in seconds."""
    device = {**GPUS, **TPUS}[target]
    executable, compiling = _compiled(step, config, options, "gpu" if isinstance(device, Gpu) else "tpu")
    compiling["tracing"] += tracing
    program = HloProgram(executable.as_text())
    temporaries = executable.memory_analysis().temp_size_in_bytes
    return CompiledStep(device, mesh, program, _memory(step, program, temporaries), compiling)


def compile_decoder(
    config: DistriConfig,
    unet: UNetConfig,
    vae: VAEConfig,
    target: str,
    *,
    devices: int,
    latent: tuple[int, int],
    images: int = 1,
    guided: bool = True,
    dtype: Any = jnp.bfloat16,
) -> dict[str, int]:
    """Compiles the VAE's decoder for a compile-only target.

    Args:
        config: As for `compile_step`.
        unet: As for `compile_step`.
        vae: Configuration of the decoder.
        target: As for `compile_step`.
        devices: Number of devices.
        latent: Rows and columns of the latent.
        images: Number of images.
        guided: Whether a step has two guidance branches, which decides the mesh.
        dtype: Of the run; the VAE's own may be wider.

    Returns:
        Bytes on each device, by kind (weights, pixels and work), and the program.
    """
    targets = compile_only_devices(target, devices)
    mesh, platform = plan_mesh(config, devices, branches=unet.branches).build(targets), targets[0].platform
    layout = layout_of(config, mesh, unet, guided=guided, latent=latent)
    form = ModelLayout.of(abstract(partial(AutoencoderKL, vae)), shard=config.shard_weights, platform=platform)
    dtype = vae.compute_dtype(dtype)
    model = Model.of(vae, form, mesh, dtype)
    latents = jax.ShapeDtypeStruct((images, *layout.padded_shape, vae.latent_channels), jnp.float32)
    latents = with_shardings(latents, layout.sharding(layout.latents))
    decoding = Described(DECODE, DecodeSpec(layout, form, dtype), model.params, (latents,))
    executable, _ = _compiled(decoding, config, {}, platform)
    analysis = executable.memory_analysis()
    memory = {
        "weights": _on_device(model.params),
        "pixels": analysis.output_size_in_bytes,
        "work": analysis.temp_size_in_bytes,
    }
    return memory, HloProgram(executable.as_text())


def decoder_seconds(program: HloProgram, gpu: Gpu, link: float | None = None) -> float:
    """The projected seconds of decoding.

    Args:
        program: Of `compile_decoder`.
        gpu: The device model.
        link: Bytes per second received; None is the GPU's own link.
    """
    return total_seconds(_simulate(program, gpu, link or gpu.link))


def _compiled(
    program: Described, config: DistriConfig, options: Any, platform: str
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """Compiles a program.

    Args:
        program: The program.
        config: The run's configuration.
        options: XLA options that override the pipeline's.
        platform: JAX's name for the target's platform.

    Returns:
        The executable, and seconds of each stage.
    """
    defaults = options_for(platform, shard_weights=config.shard_weights)
    times = [time.perf_counter()]
    with warnings.catch_warnings():  # JAX may keep the program in its cache, but cannot read it without the device
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache", UserWarning)
        traced = program.trace()
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        executable = compiled(lowered, defaults, options or {})
        times.append(time.perf_counter())
    stages = (end - start for start, end in itertools.pairwise(times))
    return executable, dict(zip(("tracing", "lowering", "XLA"), stages, strict=True))


def _on_device(part: Any) -> int:
    """Bytes of one device's shards."""
    leaves = jax.tree.leaves(part)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _memory(step: Described, program: HloProgram, temporaries: int) -> dict[str, int]:
    """Bytes on each device, by kind; weights that this program does not read count too."""
    stale = _on_device(stale_of(step))
    gathered = _gathered(program)
    return {
        "weights": _on_device(step.params),
        "stale state": stale,
        "latents and conditioning": _on_device(step.arguments) - stale,
        "gathered": gathered,
        "work": max(temporaries - gathered, 0),
    }


def _gathered(program: HloProgram) -> int:
    """The most bytes of gathered arrays that are alive at once: from the start of a gather to the last use of its result."""
    aliases = {}  # maps an instruction that only names a part of a gather's result to that gather
    last: dict[str, int] = {}
    gathers = {program.step[t.done].name: t for t in program.transfers if t.kind == "all-gather"}
    for place, instruction in enumerate(program.step):
        for name in instruction.operands:
            owner = aliases.get(name, name)
            if owner in gathers:
                last[owner] = place
                if instruction.opcode in ("bitcast", "get-tuple-element"):
                    aliases[instruction.name] = owner
    changes = Counter()
    for name, transfer in gathers.items():
        size = sum(map(array_bytes, transfer.arrays))
        changes[transfer.start] += size
        changes[last.get(name, transfer.done) + 1] -= size
    alive = most = 0
    for place in sorted(changes):
        alive += changes[place]
        most = max(most, alive)
    return most


def _simulate(program: HloProgram, gpu: Gpu, link: float) -> list[Event]:
    """The time line of the module's docstring; `link` in bytes per second."""
    events: list[Event] = []
    starts: dict[int, list[Transfer]] = {}
    ends: dict[int, list[Transfer]] = {}
    for transfer in program.transfers:
        starts.setdefault(transfer.start, []).append(transfer)
        ends.setdefault(transfer.done, []).append(transfer)
    now = free = 0.0  # when the kernels before this index are done, and when the link is free
    arrived: dict[int, float] = {}
    for place, instruction in enumerate(program.step):
        for transfer in starts.get(place, ()):
            begin = max(now, free)
            free = arrived[transfer.start] = begin + LINK_LATENCY + transfer.received / (LINK_EFFICIENCY * link)
            events.append(Event(transfer.kind, begin, free, transfer=True))
        for transfer in ends.get(place, ()):
            now = max(now, arrived[transfer.start])
        duration, matmul = _kernel(program, instruction, gpu)
        if duration and place not in starts:
            events.append(Event(instruction.name, now, now + duration, matmul=matmul))
            now += duration
    return events


def _kernel(program: HloProgram, instruction: Instruction, gpu: Gpu) -> tuple[float, bool]:
    """Seconds of an instruction's kernel, 0 where it has none; and whether it contains a matmul."""
    moved = program.moved(instruction)
    if not moved:
        return 0.0, False
    flops = program.flops(instruction)
    return max(
        flops / (MATMUL_EFFICIENCY * gpu.flops), moved / (MEMORY_EFFICIENCY * gpu.bandwidth)
    ) + LAUNCH_SECONDS, bool(flops)


def total_seconds(events: list[Event]) -> float:
    """The end of the time line.

    Args:
        events: The time line.
    """
    return max((event.end for event in events), default=0.0)


def waiting_seconds(events: list[Event]) -> float:
    """Seconds in which no kernel runs.

    Args:
        events: The time line.
    """
    return total_seconds(events) - sum(event.end - event.start for event in events if not event.transfer)


def timeline(events: list[Event], title: str) -> Figure:
    """A plot of the time line: kernels above, transfers below.

    Args:
        events: Of one projection.
        title: Above the plot.

    Raises:
        ImportError: Without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 2.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    rows = {
        "matmuls": (2, "C0", [e for e in events if e.matmul]),
        "other kernels": (1, "C1", [e for e in events if not e.matmul and not e.transfer]),
        "transfers": (0, "C2", [e for e in events if e.transfer]),
    }
    for height, colour, part in rows.values():
        spans = [(1e3 * event.start, 1e3 * (event.end - event.start)) for event in part]
        axes.broken_barh(spans, (height - 0.4, 0.8), color=colour, linewidth=0)
    axes.set_yticks([height for height, *_ in rows.values()], list(rows))
    axes.set(xlabel="ms (projection)", title=title, xlim=(0, 1e3 * total_seconds(events)))
    return figure
