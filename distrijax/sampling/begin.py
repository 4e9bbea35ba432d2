"""Where a call begins: with noise, or with an image to which noise is added. Each way is a class."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, UInt32

from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import DATA
from distrijax.parallel.programs import Stage
from distrijax.parallel.stages import On
from distrijax.sampling.noise import Stream, draw_latents, image_keys
from distrijax.schedulers import Scheduler, State


class Begin(Protocol):
    """A way to begin.

    Attributes:
        stream: The stream of the call's noise.
        start: The index in the schedule of the first step to make, in calls of the model.
    """

    stream: Stream
    start: int

    def facts(self) -> dict[str, Any]:
        """What must be the same in all processes: arrays of numpy, or values whose `repr` says all."""

    def arguments(self, on: On, layout: Layout, steps: Any, sigma: float) -> tuple:
        """What `state` takes besides, placed.

        Args:
            on: Where the call runs.
            layout: The layout of the latents.
            steps: The scheduler's constants of all steps to make, `[steps]` each.
            sigma: The standard deviation of the noise that a call without an image begins with.
        """

    @staticmethod
    def state(scheduler: Scheduler, noise: Float[Array, "b h w c"], *arguments: Any) -> State:
        """The scheduler's state before the first step.

        Args:
            scheduler: The scheduler.
            noise: Standard normal noise.
            *arguments: Those of `arguments`.
        """


@dataclasses.dataclass(frozen=True)
class FromNoise:
    """A call that begins with noise alone, at the first step."""

    stream: ClassVar[Stream] = Stream.TEXT
    start: ClassVar[int] = 0

    def facts(self):
        return {}

    def arguments(self, on, layout, steps, sigma):
        return (on.put(np.float32(sigma), layout.sharding(P())),)

    @staticmethod
    def state(scheduler, noise, sigma):
        return scheduler.init(noise, sigma)


@dataclasses.dataclass(frozen=True, eq=False)
class FromLatents:
    """A call that begins with the latents of images, at any step.

    Attributes:
        latents: The latents, without noise, on the host.
        start: The index in the schedule of the first step to make, in calls of the model.
        stream: The stream of the call's noise.
    """

    latents: Float[np.ndarray, "b c h w"]
    start: int
    stream: Stream = Stream.IMAGE

    def facts(self):
        return {"latents": self.latents, "start": self.start}

    def arguments(self, on, layout, steps, sigma):
        first = jax.tree.map(lambda column: column[0], steps)
        return put_latents(on, layout, self.latents), on.put(first, layout.sharding(P()))

    @staticmethod
    def state(scheduler, noise, latents, step):
        return scheduler.init(scheduler.add_noise(latents, noise, step))


class BeginSpec(NamedTuple):
    """What the program that begins a call depends on besides shapes; a static argument of jit.

    Attributes:
        layout: The layout of the latents.
        scheduler: The scheduler.
        channels: Channels of the latents.
        kind: The way to begin.
        stream: The stream of the call's noise.
    """

    layout: Layout
    scheduler: Scheduler
    channels: int
    kind: type[Begin]
    stream: Stream


def begin(
    spec: BeginSpec,
    params: tuple[()],
    seeds: UInt32[Array, "images 3"],
    noise: Float[Array, "images h w c"] | None,
    *arguments: Any,
) -> tuple[Key[Array, "images"], State]:
    """The images' random keys, and the state before the first step.

    Args:
        spec: What is static.
        params: None.
        seeds: Of `image_keys`.
        noise: A caller's noise; None for that of the keys.
        *arguments: Of `Begin.arguments`.
    """
    layout = spec.layout
    keys = image_keys(seeds)
    if noise is None:
        noise = draw_latents(layout, spec.channels, keys, spec.stream)
    state = spec.kind.state(spec.scheduler, noise, *arguments)
    return jax.lax.with_sharding_constraint((keys, state), _begun(spec))


def _begun(spec: BeginSpec) -> tuple:
    layout = spec.layout
    return layout.sharding(P(DATA)), layout.sharding(layout.latents)


BEGIN = Stage(begin, _begun)


def run_begin(
    on: On,
    layout: Layout,
    scheduler: Scheduler,
    channels: int,
    way: Begin,
    seeds: UInt32[np.ndarray, "images 3"],
    noise: Float[np.ndarray, "images c h w"] | None,
    steps: Any,
    sigma: float,
) -> tuple[Key[Array, "images"], State]:
    """Runs the stage `begin`, and returns keys and state on the devices.

    Args:
        on: Where the call runs.
        layout: The layout of the latents.
        scheduler: The scheduler.
        channels: Channels of the latents.
        way: The way to begin.
        seeds: Of `image_keys`, on the host.
        noise: A caller's noise, on the host; None for that of the seeds.
        steps: The scheduler's constants of all steps to make.
        sigma: The standard deviation of the noise that a call without an image begins with.
    """
    spec = BeginSpec(layout, scheduler, channels, type(way), way.stream)
    seeds = on.put(seeds, layout.sharding(P(DATA)))
    noise = None if noise is None else put_latents(on, layout, noise)
    return on.run(BEGIN, spec, (), seeds, noise, *way.arguments(on, layout, steps, sigma))


def put_latents(on: On, layout: Layout, latents: Float[np.ndarray, "b c h w"]) -> Float[Array, "b H W c"]:
    """Places latents with their padding, which mirrors them, since naive_patch generates it too.

    Args:
        on: Where the call runs.
        layout: The layout of the latents.
        latents: The latents, on the host.
    """
    missing = [whole - own for whole, own in zip(layout.padded_shape, latents.shape[2:], strict=True)]
    padded = np.pad(np.moveaxis(latents, 1, -1), ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)), "symmetric")
    return on.put(padded, layout.sharding(layout.latents))
