"""Traffic of a run from shapes alone: the step is traced for an abstract mesh, and its collectives are counted.

Neither devices nor weights are needed. The figures are those of the main step, the kind that most of a run's steps are:
displaced, or synchronous where no step is displaced.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from distrijax.config import DistriConfig
from distrijax.models.unet import abstract_unet
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.exchange import HALO, KV, MOMENTS, Stale
from distrijax.parallel.layout import check_images
from distrijax.parallel.mesh import CFG, DATA, MeshPlan, plan_mesh
from distrijax.parallel.platform import tracing_for
from distrijax.parallel.stages import Described
from distrijax.sampling.denoise import LoopSpec
from distrijax.sampling.describe import describe_steps
from distrijax.sampling.layouts import layout_of
from distrijax.sampling.steps import StepPlan, plan_steps
from distrijax.schedulers import Scheduler
from distrijax.weights.models import UNET, Models
from distrijax.weights.sharding import ModelLayout

PRIMITIVES = {
    "all_gather": None,
    "all_gather_invariant": "weights",
    "ppermute": HALO,
    "all_to_all": "columns",
    "psum": None,
    "psum_invariant": None,
}
"""What each of JAX's collectives carries; None where its operand (of a gather) or its axes (of a sum) decide."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic and stale state of one device in one step.

    Attributes:
        mesh: Sizes of the mesh axes.
        patches: Bands of rows.
        rows: Latent rows of one band.
        height: Latent rows of the image.
        stale: Bytes of its own values that the device keeps for the next step, by kind.
        received: Bytes that the device which receives most receives, by kind; an all-reduce counts as a ring's.
    """

    mesh: MeshPlan
    patches: int
    rows: int
    height: int
    stale: dict[str, int]
    received: dict[str, int]

    @property
    def padding(self) -> float:
        """Share of all patches' rows that lie outside the image."""
        return 1 - self.height / (self.patches * self.rows)

    def __str__(self) -> str:
        kept, received = (
            ", ".join(f"{kind} {megabytes(count)}" for kind, count in sorted(part.items())) or "nothing"
            for part in (self.stale, self.received)
        )
        filled = -(-self.height // self.rows)
        idle = f"; {filled} patches would take as long" if filled < self.patches else ""
        rows = f"padding  {self.padding:.1%} of the rows that the devices compute{idle}\n" if self.padding else ""
        return (
            f"{rows}stale    {megabytes(sum(self.stale.values()))} on each device: {kept}\n"
            f"received {megabytes(sum(self.received.values()))} by each device and step: {received}"
        )


def traffic(
    config: DistriConfig,
    unet: UNetConfig,
    scheduler: Scheduler,
    *,
    devices: int,
    latent: tuple[int, int],
    images: int = 1,
    guided: bool = True,
    dtype: Any = jnp.bfloat16,
) -> Traffic:
    """Traffic and stale state of a run's main step.

    Args:
        config: The run's configuration.
        unet: The UNet's configuration.
        scheduler: The run's scheduler.
        devices: Number of devices.
        latent: Height and width of the latent.
        images: Images of a call.
        guided: Whether the guidance scale is above 1.
        dtype: Of the weights and activations.

    Raises:
        InvalidArgument: For axis sizes that do not fit `devices` or `images`.
    """
    mesh = plan_mesh(config, devices, branches=unet.branches)
    with tracing_for("gpu"):  # a TPU's permutes receive as many bytes
        step = main_step(config, unet, scheduler, mesh, latent=latent, images=images, guided=guided, dtype=dtype)
        program = step.trace().jaxpr
    layout = step.static.loop.layout
    received, by_patch = Counter(), Counter()
    for kind, patch, count in _collectives(program.jaxpr, layout.mesh.shape):
        if patch is None:
            received[kind] += count
        else:
            by_patch[patch] += count
    if by_patch:
        received[HALO] = max(by_patch.values())
    stale = Counter()
    for (kind, _), leaf in stale_of(step).items():
        stale[kind.partition(".")[0]] += (
            _bytes(leaf) // mesh.devices
        )  # every leaf is sharded over every axis of the mesh
    rounded = {kind: round(count) for kind, count in received.items()}
    return Traffic(mesh, layout.patches, layout.bands.rows_per_device, latent[0], dict(stale), rounded)


def main_step(
    config: DistriConfig,
    unet: UNetConfig,
    scheduler: Scheduler,
    mesh: MeshPlan,
    *,
    latent: tuple[int, int],
    images: int = 1,
    guided: bool = True,
    dtype: Any = jnp.bfloat16,
    devices: Sequence[jax.Device] | None = None,
    platform: str | None = None,
) -> Described:
    """The kind of step that most of a run's steps are: displaced, or synchronous where no step is displaced.

    Args:
        config: The run's configuration.
        unet: The UNet's configuration.
        scheduler: The run's scheduler.
        mesh: Sizes of the mesh axes.
        latent: Height and width of the latent.
        images: Images of a call.
        guided: Whether the guidance scale is above 1.
        dtype: Of the weights and activations.
        devices: Devices to compile for; None where the step is only traced.
        platform: JAX's platform whose parameter layout is used (default: that of `devices`, or a CPU's).
    """
    config = dataclasses.replace(config, sync_steps=())
    sizes = [None] * (config.warmup_steps + 2)  # the fewest that have a displaced one
    where = mesh.abstract() if devices is None else mesh.build(devices)
    platform = platform or (devices[0].platform if devices else "cpu")
    _, kinds = step_kinds(
        config,
        unet,
        scheduler,
        where,
        sizes,
        latent=latent,
        images=images,
        guided=guided,
        dtype=dtype,
        platform=platform,
    )
    return [*kinds.values()][-1]


def step_kinds(
    config: DistriConfig,
    unet: UNetConfig,
    scheduler: Scheduler,
    mesh: Mesh | AbstractMesh,
    sizes: Sequence[tuple[int, int] | None],
    *,
    latent: tuple[int, int],
    images: int = 1,
    guided: bool = True,
    dtype: Any = jnp.bfloat16,
    platform: str = "cpu",
) -> tuple[StepPlan, dict[Hashable, Described]]:
    """The kinds of a run's steps, and a program of one step of each kind.

    Args:
        config: The run's configuration.
        unet: The UNet's configuration.
        scheduler: The run's scheduler.
        mesh: The mesh.
        sizes: Of each step, the size of the deep part's map; None for that of the latents.
        latent: Height and width of the latent.
        images: Images of a call.
        guided: Whether the guidance scale is above 1.
        dtype: Of the weights and activations.
        platform: JAX's platform whose parameter layout is used.
    """
    check_images(images, mesh.shape[DATA])
    layout = layout_of(config, mesh, unet, guided=guided, latent=latent)
    form = ModelLayout.of(abstract_unet(unet), layout.parallelism, shard=config.shard_weights, platform=platform)
    loop = LoopSpec(layout, Models.of(**{UNET: form}), scheduler, dtype)
    plan = plan_steps(config, layout, len(sizes), sizes)
    return plan, describe_steps(loop, plan, unet, images)


def stale_of(step: Described) -> Stale:
    """The stale state that a step reads; empty if there is none.

    Args:
        step: Of `main_step`.
    """
    _, _, stale, _ = step.arguments
    return stale


def _collectives(jaxpr: Any, sizes: Mapping[str, int]) -> Iterator[tuple[str, int | None, float]]:
    """The collectives of a program; of a conditional, those of the branch that receives most.

    Args:
        jaxpr: The traced program.
        sizes: Sizes of the mesh axes.

    Yields:
        Kind, receiving patch (None for all), and bytes received.
    """
    for equation in _live_equations(jaxpr):
        inner = [branch for value in equation.params.values() for branch in _inner_jaxprs(value)]
        if equation.primitive.name == "cond":
            yield from max(
                (list(_collectives(branch, sizes)) for branch in inner), key=lambda found: sum(n for *_, n in found)
            )
        else:
            for program in inner:
                yield from _collectives(program, sizes)
        name = equation.primitive.name
        if name not in PRIMITIVES:
            continue
        axes = equation.params.get("axes") or equation.params["axis_name"]
        axes = axes if isinstance(axes, tuple) else (axes,)
        n = math.prod(sizes[axis] for axis in axes)
        for operand in (variable.aval for variable in equation.invars):
            if name == "ppermute":
                yield from ((PRIMITIVES[name], target, _bytes(operand)) for _, target in equation.params["perm"])
                continue
            times = {"all_gather": n - 1, "all_gather_invariant": n - 1, "all_to_all": (n - 1) / n}.get(
                name, 2 * (n - 1) / n
            )
            summed = "guidance" if CFG in axes else "partial sums"
            kind = PRIMITIVES[name] or (_kind(operand) if name == "all_gather" else summed)
            yield kind, None, times * _bytes(operand)


def _live_equations(jaxpr: Any) -> list[Any]:
    """The equations on which a program's results depend; XLA removes the others, such as gathers of unread weights."""
    wanted, used = set(map(id, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in wanted for variable in equation.outvars):
            wanted.update(map(id, equation.invars))
            used.append(equation)
    return used[::-1]


def _inner_jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs inside an equation's parameter."""
    for item in value if isinstance(value, tuple | list) else (value,):
        if hasattr(item, "eqns"):
            yield item
        elif hasattr(item, "jaxpr"):
            yield item.jaxpr


def _kind(leaf: Any) -> str:
    """The kind of an array that is all-gathered (`distrijax.parallel.exchange.Stale`), by its shape."""
    if len(leaf.shape) == 4:
        return HALO
    return MOMENTS if leaf.shape[-1] == 2 else KV


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def megabytes(count: float) -> str:
    """Bytes as text, in MB or GB.

    Args:
        count: Bytes.
    """
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
