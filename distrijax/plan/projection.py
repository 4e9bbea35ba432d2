"""What a step would take on GPUs or TPUs that are not here: compiled for them by XLA, and projected from the program's schedule.

Memory, bytes, operations and what hides what are those of the compiled program. For TPUs libtpu itself estimates the cycles of
each kernel. For GPUs times are projections of a simple model:

    product     its operations at MATMUL_EFFICIENCY of the GPU's peak, or its bytes at MEMORY_EFFICIENCY of the bandwidth, whichever takes longer
    other       its bytes at MEMORY_EFFICIENCY of the bandwidth
    kernel      LAUNCH_SECONDS besides
    transfer    LINK_LATENCY, and its bytes at LINK_EFFICIENCY of the link; one after the other, beside the kernels

Kernels wait for a transfer at its done alone. MATMUL_EFFICIENCY was chosen so that one A100 takes about as long for SDXL's UNet at 3840x3840
as the original's authors measured (2.8 s, arXiv 2402.19481); the others are common values. None was measured here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from distrijax.config import DistriConfig
from distrijax.models.layers import abstract
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.parallel.mesh import MeshPlan, plan_mesh
from distrijax.parallel.programs import compiled, options_for, trace
from distrijax.plan.overlap import HloProgram, Instruction, Transfer, array_bytes
from distrijax.plan.targets import GPUS, TPUS, Gpu, Tpu, compile_only_devices
from distrijax.plan.traffic import main_step
from distrijax.sampling import denoise
from distrijax.sampling.decode import Decoder, decode
from distrijax.sampling.shapes import StepProgram
from distrijax.schedulers import Scheduler
from distrijax.weights.sharding import Model, ModelLayout, placed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, LINK_EFFICIENCY = 0.6, 0.8, 0.7
LAUNCH_SECONDS, LINK_LATENCY = 3e-6, 15e-6  # seconds

LINKS = {"pcie": 32e9, "network": 25e9}
"""Bytes per second that come in over other links than a host's own: PCIe 4.0 x16; 200 Gbit/s for each GPU between hosts."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel or a transfer on the projected time line, in seconds. product: whether it is one, or else moves bytes."""

    name: str
    start: float
    end: float
    product: bool = False
    transfer: bool = False


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """One displaced step (or stateless, where no step is displaced), compiled for some GPU or TPU.

    memory: bytes on each device: weights, stale state, other arguments, gathered (the most that is alive at once of what
    gathers brought), and work (the rest of what the program needs). flops: of the products, of one device. compiling: seconds
    of each stage of it, here; tracing is also of the step before, whose results this one takes.
    """

    target: Gpu | Tpu
    mesh: MeshPlan
    program: HloProgram
    memory: dict[str, int]
    compiling: dict[str, float]

    @property
    def flops(self) -> int:
        return sum(map(self.program.flops, self.program.step))

    @property
    def received(self) -> int:
        return sum(transfer.received for transfer in self.program.transfers)

    def events(self, link: float | None = None) -> list[Event]:
        """The projected time line on GPUs. link: bytes per second that come in; None is the GPU's own."""
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
    """Compiles the step that most of a run's steps are, for GPUs or TPUs that need not be there.

    target: a name out of `distrijax.plan.targets.GPUS` or `TPUS`. latent: its height and width. options: for XLA, before the
    pipeline's. Raises DistriError for what cannot be shared out, and where the compiler for these devices is not installed.
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
    outlined = time.perf_counter() - start
    platform = targets[0].platform
    executable, compiling = _compiled(step.function, step.loop, step.placed(), step.donate, config, options, platform)
    compiling["tracing"] += outlined
    program = HloProgram(executable.as_text())
    temporaries = executable.memory_analysis().temp_size_in_bytes
    return CompiledStep({**GPUS, **TPUS}[target], mesh, program, _memory(step, program, temporaries), compiling)


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
    """Bytes on each device while latents become pictures, by kind: weights, pixels and work. Arguments as `compile_step`'s."""
    targets = compile_only_devices(target, devices)
    mesh, platform = plan_mesh(config, devices, branches=unet.branches).build(targets), targets[0].platform
    layout = denoise.layout_of(config, mesh, unet, guided=guided, latent=latent)
    form = ModelLayout.of(abstract(partial(AutoencoderKL, vae)), shard=config.shard_weights, platform=platform)
    dtype = vae.compute_dtype(dtype)
    model = Model.of(vae, form, mesh, dtype)
    latents = jax.ShapeDtypeStruct((images, *layout.padded_shape, vae.latent_channels), jnp.float32)
    latents = placed(mesh, layout.latents, latents)
    executable, _ = _compiled(decode, Decoder(layout, form, dtype), (model.params, latents), (), config, {}, platform)
    analysis = executable.memory_analysis()
    return {
        "weights": _on_device(model.params),
        "pixels": analysis.output_size_in_bytes,
        "work": analysis.temp_size_in_bytes,
    }


def _compiled(
    function: Callable,
    static: Any,
    arguments: tuple,
    donate: tuple[int, ...],
    config: DistriConfig,
    options: Any,
    platform: str,
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The program, and seconds of each stage. donate: which of the arguments after the parameters."""
    ours = options_for(platform, shard_weights=config.shard_weights)
    times = [time.perf_counter()]
    with warnings.catch_warnings():  # JAX may keep the program in its cache, but cannot read it without the device
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache", UserWarning)
        traced = trace(function, static, *arguments, donate=donate)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        executable = compiled(lowered, ours, options or {})
        times.append(time.perf_counter())
    stages = (end - start for start, end in itertools.pairwise(times))
    return executable, dict(zip(("tracing", "lowering", "XLA"), stages, strict=True))


def _on_device(part: Any) -> int:
    """Bytes of one device's part of arrays."""
    leaves = jax.tree.leaves(part)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _memory(step: StepProgram, program: HloProgram, temporaries: int) -> dict[str, int]:
    """Bytes on each device, by kind. All weights count, those too that this program does not read."""

    params, *arguments = step.placed()
    stale = _on_device(arguments[2]) if step.stale else 0
    gathered = _gathered(program)
    return {
        "weights": _on_device(params),
        "stale state": stale,
        "latents and conditioning": _on_device(arguments) - stale,
        "gathered": gathered,
        "work": max(temporaries - gathered, 0),
    }


def _gathered(program: HloProgram) -> int:
    """The most bytes of gathered arrays that are alive at once: from the start of a gather to the last use of its result."""
    aliases = {}  # of an instruction that only names a part of a gather's result: that gather
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
    events: list[Event] = []
    starts: dict[int, list[Transfer]] = {}
    ends: dict[int, list[Transfer]] = {}
    for transfer in program.transfers:
        starts.setdefault(transfer.start, []).append(transfer)
        ends.setdefault(transfer.done, []).append(transfer)
    now = free = 0.0  # when the kernels before this place are done, and when the link is
    arrived: dict[int, float] = {}
    for place, instruction in enumerate(program.step):
        for transfer in starts.get(place, ()):
            begin = max(now, free)
            free = arrived[transfer.start] = begin + LINK_LATENCY + transfer.received / (LINK_EFFICIENCY * link)
            events.append(Event(transfer.kind, begin, free, transfer=True))
        for transfer in ends.get(place, ()):
            now = max(now, arrived[transfer.start])
        duration, product = _kernel(program, instruction, gpu)
        if duration and place not in starts:
            events.append(Event(instruction.name, now, now + duration, product=product))
            now += duration
    return events


def _kernel(program: HloProgram, instruction: Instruction, gpu: Gpu) -> tuple[float, bool]:
    """Seconds of an instruction's kernel, 0 for none; and whether it is a product."""
    moved = program.moved(instruction)
    if not moved:
        return 0.0, False
    flops = program.flops(instruction)
    return max(
        flops / (MATMUL_EFFICIENCY * gpu.flops), moved / (MEMORY_EFFICIENCY * gpu.bandwidth)
    ) + LAUNCH_SECONDS, bool(flops)


def total_seconds(events: list[Event]) -> float:
    """The end of the time line."""
    return max((event.end for event in events), default=0.0)


def waiting_seconds(events: list[Event]) -> float:
    """Seconds in which no kernel runs."""
    return total_seconds(events) - sum(event.end - event.start for event in events if not event.transfer)


def timeline(events: list[Event], title: str) -> Figure:
    """A picture: kernels above, transfers below. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 2.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    rows = {
        "products": (2, "C0", [e for e in events if e.product]),
        "other kernels": (1, "C1", [e for e in events if not e.product and not e.transfer]),
        "transfers": (0, "C2", [e for e in events if e.transfer]),
    }
    for height, colour, part in rows.values():
        spans = [(1e3 * event.start, 1e3 * (event.end - event.start)) for event in part]
        axes.broken_barh(spans, (height - 0.4, 0.8), color=colour, linewidth=0)
    axes.set_yticks([height for height, *_ in rows.values()], list(rows))
    axes.set(xlabel="ms (projection)", title=title, xlim=(0, 1e3 * total_seconds(events)))
    return figure
