"""The steps of a call: their constants, their kinds, and how the steps of each kind are made."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from distrijax.config import DistriConfig, Parallelism, StepKind
from distrijax.parallel.bands import Bands
from distrijax.parallel.displaced import Strategy, strategy_of
from distrijax.parallel.exchange import Exchange, Publishing, Stale, Synchronous
from distrijax.parallel.layout import Layout
from distrijax.sampling.noise import Stream
from distrijax.sampling.predict import PREDICT_NOISE, IndependentPatches, Predictor, ShrinkDeep


class StepInputs(NamedTuple):
    """The constants of all steps, or of one.

    Attributes:
        scheduler: The scheduler's constants.
        number: The number of the step in the whole schedule, from 1, plus the stream of the call's noise (`Stream`): which noise
            of the image is the step's.
        step_ratio: The distance to the next timestep over the distance from the previous one.
    """

    scheduler: Any
    number: Int32[Array | np.ndarray, "*steps"]
    step_ratio: Float[Array | np.ndarray, "*steps"]

    @classmethod
    def of(cls, scheduler: Any, start: int = 0, stream: Stream = Stream.TEXT) -> StepInputs:
        """The constants of all steps to make, on the host. The ratio is 1 at both ends, and where a timestep is repeated.

        Args:
            scheduler: The scheduler's constants of all steps from `start` on, `[steps]` each.
            start: The index in the whole schedule of the first of them.
            stream: The stream of the call's noise.
        """
        strides = np.diff(np.asarray(scheduler.timestep, np.float64))
        ratio = np.ones(len(strides) + 1, np.float32)
        moving = (strides[1:] != 0) & (strides[:-1] != 0)
        ratio[1:-1][moving] = strides[1:][moving] / strides[:-1][moving]
        return cls(scheduler, np.arange(start + 1, start + len(ratio) + 1, dtype=np.int32) + np.int32(stream), ratio)

    def part(self, start: int, stop: int | None) -> StepInputs:
        """The constants of some of the steps.

        Args:
            start: Index of the first.
            stop: Index after the last.
        """
        return jax.tree.map(lambda column: column[start:stop], self)


class StepRule(Protocol):
    """How the steps of one kind are made. Hashable, for it is static.

    Attributes:
        predictor: What they predict with.
        reads: Whether each reads what the step before it published.
        publishes: Whether each publishes something for the next; of steps that read nothing, the last of a program does.
    """

    predictor: Predictor
    reads: bool
    publishes: bool

    def exchange(self, layout: Layout, stale: Stale, x: StepInputs) -> Exchange:
        """The exchange of one step, which answers for the rest of the image.

        Args:
            layout: The layout of the latents.
            stale: What the step before published; empty if nothing is read.
            x: The step's constants.
        """


@dataclasses.dataclass(frozen=True)
class SynchronousSteps:
    """Steps that read values of this step.

    Attributes:
        predictor: What they predict with.
        publishing: What the last of a program publishes for displaced steps; None for nothing.
    """

    predictor: Predictor = PREDICT_NOISE
    publishing: Publishing | None = None
    reads = False

    @property
    def publishes(self) -> bool:
        return self.publishing is not None

    def exchange(self, layout, stale, x):
        return layout.exact() if self.publishing is None else Synchronous(layout.rows, layout.bands, self.publishing)


@dataclasses.dataclass(frozen=True)
class DisplacedSteps:
    """Steps that read what the step before published.

    Attributes:
        strategy: What they exchange.
        predictor: What they predict with.
    """

    strategy: Strategy
    predictor: Predictor = PREDICT_NOISE
    reads = True
    publishes = True

    def exchange(self, layout, stale, x):
        return self.strategy(stale, layout.rows, layout.bands, x.step_ratio)


class StepPlan(NamedTuple):
    """The kinds of a call's steps.

    Attributes:
        kinds: The kind of each step.
        rules: How the steps of each kind are made.
    """

    kinds: Sequence[Hashable]
    rules: Mapping[Hashable, StepRule]

    @property
    def displaced(self) -> bool:
        """Whether some steps read what the step before published."""
        return any(rule.reads for rule in self.rules.values())

    def pieces(self, size: int) -> Iterator[tuple[int, int]]:
        """Yields start and stop of runs of steps of one kind.

        Args:
            size: At most so many steps each.
        """
        start = 0
        for _, alike in itertools.groupby(self.kinds):
            end = start + len(list(alike))
            yield from ((first, min(first + size, end)) for first in range(start, end, size))
            start = end


class SizedKind(NamedTuple):
    """A kind of step whose deep part runs at a smaller size.

    Attributes:
        kind: What it reads of the rest of the image.
        size: Rows and columns of the deep part's map.
    """

    kind: StepKind
    size: tuple[int, int]


def plan_steps(
    config: DistriConfig,
    layout: Layout,
    steps: int,
    sizes: Sequence[tuple[int, int] | None] | None = None,
    predictor: Predictor = PREDICT_NOISE,
) -> StepPlan:
    """The steps of a call: the one place that chooses their kinds.

    Where the size of the deep part changes, a synchronous step makes the stale state anew.

    Args:
        config: What the user set.
        layout: The layout of the latents.
        steps: Number of steps.
        sizes: Of each step, rows and columns of the deep part's map; None for those of the latents.
        predictor: What steps predict with at the latents' size.
    """
    sizes = [None] * steps if sizes is None else sizes
    kinds = config.step_kinds(steps)
    strategy = strategy_of(config, layout.patches) if layout.parallelism is Parallelism.PATCH else None
    if strategy is None:
        kinds = [StepKind.SYNCHRONOUS] * steps
    changes = [number for number in range(1, steps) if sizes[number] != sizes[number - 1]]
    for number in changes:
        kinds[number] = StepKind.SYNCHRONOUS
    if StepKind.DISPLACED not in kinds:
        strategy = None

    def rule(kind: StepKind, size: tuple[int, int] | None) -> StepRule:
        predicts = predictor if size is None else _shrunk(layout, size)
        if layout.parallelism is Parallelism.NAIVE_PATCH:
            predicts = IndependentPatches(layout)
        if kind is StepKind.DISPLACED:
            return DisplacedSteps(strategy, predicts)
        return SynchronousSteps(predicts, strategy and strategy.publishing)

    named = [kind if size is None else SizedKind(kind, size) for kind, size in zip(kinds, sizes, strict=True)]
    return StepPlan(
        named, {name: rule(*each) for name, each in zip(named, zip(kinds, sizes, strict=True), strict=True)}
    )


def _shrunk(layout: Layout, size: tuple[int, int]) -> Predictor:
    return ShrinkDeep(layout.latent, size, layout.bands, Bands.among(size[0], layout.patches, levels=layout.levels))
