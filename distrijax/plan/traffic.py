"""What a run will exchange, from shapes alone: the program is traced for an abstract mesh, and its collectives are counted.

No device and no weights are needed. The figures are those of the step that most of the steps are: displaced, or stateless
where no step is.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distrijax.config import DistriConfig
from distrijax.models.unet import abstract_unet
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.exchange import HALO, KV, MOMENTS
from distrijax.parallel.layout import check_images
from distrijax.parallel.mesh import CFG, MeshPlan, plan_mesh
from distrijax.sampling import denoise
from distrijax.sampling.shapes import StepProgram, step_programs
from distrijax.schedulers import Scheduler
from distrijax.weights.sharding import ModelLayout

COLLECTIVES = {
    "all_gather": None,
    "all_gather_invariant": "weights",
    "ppermute": HALO,
    "all_to_all": "columns",
    "psum": None,
    "psum_invariant": None,
}
"""Collectives as JAX names them, and what they carry; a gather's operand tells, and a sum's axes."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device does at a step.

    patches: bands of rows. rows: of the latent, in each. height: all rows of the latent. stale: bytes that it keeps of its own
    for the next step, by kind. received: bytes that come in from the others, by kind, on the device that receives most; an
    all-reduce counts as a ring's.
    """

    mesh: MeshPlan
    patches: int
    rows: int
    height: int
    stale: dict[str, int]
    received: dict[str, int]

    @property
    def padding(self) -> float:
        """The part of all patches' rows that is no part of the image."""
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
    """The plan of a run; latent: its height and width. guided: whether the guidance scale is above 1.

    Raises DistriError for axis sizes that do not fit `devices` or `images`.
    """
    mesh = plan_mesh(config, devices, branches=unet.branches)
    step = main_step(config, unet, scheduler, mesh, latent=latent, images=images, guided=guided, dtype=dtype)
    layout = step.loop.layout
    program = jax.make_jaxpr(partial(step.function, step.loop))(step.params, *step.arguments)
    received, by_patch = Counter(), Counter()
    for kind, patch, count in _collectives(program.jaxpr, layout.mesh.shape):
        if patch is None:
            received[kind] += count
        else:
            by_patch[patch] += count
    if by_patch:
        received[HALO] = max(by_patch.values())
    stale = Counter()
    for leaf in step.stale.values():
        stale[_kind(leaf)] += _bytes(leaf) // mesh.devices  # every axis of the mesh cuts every leaf
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
) -> StepProgram:
    """The step that most of a run's steps are: displaced, or stateless where no step is.

    guided: whether the guidance scale is above 1. devices: to compile it for; None where it is only traced. platform: of
    devices like which parameters lie (default: theirs, or a CPU's).
    """
    check_images(images, mesh.data)
    where = mesh.abstract() if devices is None else mesh.build(devices)
    layout = denoise.layout_of(config, where, unet, guided=guided, latent=latent)
    platform = platform or (devices[0].platform if devices else "cpu")
    form = ModelLayout.of(abstract_unet(unet), layout.parallelism, shard=config.shard_weights, platform=platform)
    return step_programs(denoise.loop_of(config, layout, form, scheduler, dtype), unet, images)[-1]


def _collectives(jaxpr: Any, sizes: Mapping[str, int]) -> Iterator[tuple[str, int | None, float]]:
    """(kind, receiving patch or None for all, bytes) of every collective of a program; of a conditional, its dearer branch.

    sizes: of the mesh's axes.
    """
    for equation in _used(jaxpr):
        inner = [branch for value in equation.params.values() for branch in _programs(value)]
        if equation.params.get("branches_platforms"):
            inner = inner[-1:]  # the default; other platforms' ways bring in as many bytes
        if equation.primitive.name == "cond":
            yield from max(
                (list(_collectives(branch, sizes)) for branch in inner), key=lambda found: sum(n for *_, n in found)
            )
        else:
            for program in inner:
                yield from _collectives(program, sizes)
        name = equation.primitive.name
        if name not in COLLECTIVES:
            continue
        axes = equation.params.get("axes") or equation.params["axis_name"]
        axes = axes if isinstance(axes, tuple) else (axes,)
        n = math.prod(sizes[axis] for axis in axes)
        for operand in (variable.aval for variable in equation.invars):
            if name == "ppermute":
                yield from ((COLLECTIVES[name], target, _bytes(operand)) for _, target in equation.params["perm"])
                continue
            times = {"all_gather": n - 1, "all_gather_invariant": n - 1, "all_to_all": (n - 1) / n}.get(
                name, 2 * (n - 1) / n
            )
            summed = "guidance" if CFG in axes else "partial sums"
            kind = COLLECTIVES[name] or (_kind(operand) if name == "all_gather" else summed)
            yield kind, None, times * _bytes(operand)


def _used(jaxpr: Any) -> list[Any]:
    """The equations on which a program's results depend; XLA leaves out the others, such as gathers of unread weights."""
    wanted, used = set(map(id, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in wanted for variable in equation.outvars):
            wanted.update(map(id, equation.invars))
            used.append(equation)
    return used[::-1]


def _programs(value: Any) -> Iterator[Any]:
    """The programs inside an equation's parameter."""
    for item in value if isinstance(value, tuple | list) else (value,):
        if hasattr(item, "eqns"):
            yield item
        elif hasattr(item, "jaxpr"):
            yield item.jaxpr


def _kind(leaf: Any) -> str:
    """Which question of a layer a published array answers (`distrijax.parallel.exchange.Stale`)."""
    if len(leaf.shape) == 4:
        return HALO
    return MOMENTS if leaf.shape[-1] == 2 else KV


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
