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
from distrijax.parallel.displaced import Strategy, strategy_of
from distrijax.parallel.exchange import Exchange, Publishing, Stale, Synchronous
from distrijax.parallel.layout import Layout
from distrijax.sampling.noise import Stream
from distrijax.sampling.predict import PREDICT_NOISE, IndependentPatches, Predictor


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


def plan_steps(config: DistriConfig, layout: Layout, steps: int) -> StepPlan:
    """The steps of a call: the one place that chooses their kinds.

    Args:
        config: What the user set.
        layout: The layout of the latents.
        steps: Number of steps.
    """
    kinds = config.step_kinds(steps)
    strategy = strategy_of(config, layout.patches) if layout.parallelism is Parallelism.PATCH else None
    if strategy is None or StepKind.DISPLACED not in kinds:
        naive = layout.parallelism is Parallelism.NAIVE_PATCH
        rule = SynchronousSteps(IndependentPatches(layout) if naive else PREDICT_NOISE)
        return StepPlan([StepKind.SYNCHRONOUS] * steps, {StepKind.SYNCHRONOUS: rule})
    rules = {
        StepKind.SYNCHRONOUS: SynchronousSteps(publishing=strategy.publishing),
        StepKind.DISPLACED: DisplacedSteps(strategy),
    }
    return StepPlan(kinds, rules)
