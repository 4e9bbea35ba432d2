"""Frozen, validated configuration: how a run is spread over devices."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Any

from distrijax.errors import DistriError
from distrijax.validate import choose, flag, is_whole, positive, scalar


class SyncMode(enum.StrEnum):
    """What a patch knows of the others after the warm-up.

    Names as in DistriFusion's `mode`; damped_async_gn and async_tokens are ours.
    """

    CORRECTED_ASYNC_GN = "corrected_async_gn"
    DAMPED_ASYNC_GN = "damped_async_gn"
    ASYNC_TOKENS = "async_tokens"
    STALE_GN = "stale_gn"
    SYNC_GN = "sync_gn"
    SEPARATE_GN = "separate_gn"
    FULL_SYNC = "full_sync"
    NO_SYNC = "no_sync"


class Parallelism(enum.StrEnum):
    """How the UNet is divided among the devices."""

    PATCH = "patch"
    NAIVE_PATCH = "naive_patch"
    TENSOR = "tensor"


class SplitScheme(enum.StrEnum):
    """How naive_patch cuts the picture: into bands of rows, of columns, or one after the other from step to step."""

    ROW = "row"
    COLUMN = "column"
    ALTERNATE = "alternate"


class Compression(enum.StrEnum):
    """What keys and values travel as after the warm-up: 256 or 16 levels for each channel of a patch."""

    INT8 = "int8"
    INT4 = "int4"


@dataclasses.dataclass(frozen=True)
class DistriConfig:
    """How one picture is spread over devices; names follow the original DistriFusion where it has them.

    devices: how many devices to use; None means all that JAX shows.
    sync_mode: what the patches exchange after the warm-up (`SyncMode`).
    warmup_steps: synchronous steps after the first, so `warmup_steps + 1` UNet calls are exact.
    sync_steps: further synchronous steps, numbered from 0, or from the end: -1 is the last. Those that a call does not have
        are passed over.
    extrapolate: devices publish, after the warm-up, a prediction of their next step's values instead of this step's; the
        same traffic, twice the stale state.
    compress: what keys and values travel as after the warm-up (`Compression`): a half or a quarter of bfloat16's bytes,
        lossy; None leaves them as they are.
    shard_weights: each device keeps an equal share of all large weights, and gathers each layer's shortly before its use:
        for devices of little memory and quick links.
    split_batch: run the unconditional and the conditional branch on two halves of the mesh (CFG split).
    parallelism: how the UNet is divided (`Parallelism`); only patch knows stale values, so `sync_mode`,
        `warmup_steps` and `sync_steps` say nothing in naive_patch, which exchanges no activations, and in tensor, which
        is exact.
    split_scheme: how naive_patch cuts the picture (`SplitScheme`).
    data, cfg, patch: sizes of the mesh axes; None lets the planner choose.
    """

    devices: int | None = None
    sync_mode: SyncMode = SyncMode.CORRECTED_ASYNC_GN
    warmup_steps: int = 4
    sync_steps: Sequence[int] = ()
    extrapolate: bool = False
    compress: Compression | None = None
    shard_weights: bool = False
    split_batch: bool = True
    parallelism: Parallelism = Parallelism.PATCH
    split_scheme: SplitScheme = SplitScheme.ALTERNATE
    data: int | None = None
    cfg: int | None = None
    patch: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "sync_mode", choose(SyncMode, self.sync_mode, "sync_mode"))
        object.__setattr__(self, "parallelism", choose(Parallelism, self.parallelism, "parallelism"))
        object.__setattr__(self, "split_scheme", choose(SplitScheme, self.split_scheme, "split_scheme"))
        if self.compress is not None:
            object.__setattr__(self, "compress", choose(Compression, self.compress, "compress"))
        for name in ("extrapolate", "shard_weights", "split_batch"):
            object.__setattr__(self, name, flag(getattr(self, name), name))
        object.__setattr__(self, "warmup_steps", positive(self.warmup_steps, "warmup_steps", least=0))
        object.__setattr__(self, "sync_steps", _step_numbers(self.sync_steps))
        for name in self._idle_options():
            mode = self.sync_mode if self.parallelism is Parallelism.PATCH else self.parallelism
            raise DistriError(f"{name} is set and changes nothing in {mode}; leave it out or choose another mode")
        for name in ("devices", "data", "cfg", "patch"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive(getattr(self, name), name))
        if self.cfg not in (None, 1, 2):
            raise DistriError(f"cfg is {self.cfg}; guidance has two branches, so use 1 or 2")
        if self.cfg == 2 and not self.split_batch:
            raise DistriError(
                "cfg=2 splits the guidance branches and split_batch=False forbids it; drop one of the two"
            )

    def _idle_options(self) -> list[str]:
        """The options that are set although no displaced step, or none that publishes anything new, will heed them."""
        displaced = self.parallelism is Parallelism.PATCH and self.sync_mode is not SyncMode.FULL_SYNC
        heeded = {
            "extrapolate": displaced and self.sync_mode is not SyncMode.NO_SYNC,
            "compress": displaced,
            "sync_steps": displaced,
        }
        return [name for name, heed in heeded.items() if getattr(self, name) and not heed]

    def synchronous(self, steps: int) -> list[bool]:
        """Of each of a call's steps, whether it is synchronous."""
        further = {number % steps for number in self.sync_steps if -steps <= number < steps}
        return [number <= self.warmup_steps or number in further for number in range(steps)]


def _step_numbers(value: Any) -> tuple[int, ...]:
    """Numbers of steps as a tuple; raises DistriError for what is none."""
    value = scalar(value)
    steps = tuple(map(scalar, value)) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not all(map(is_whole, steps)):
        raise DistriError(f"sync_steps is {value!r}; give whole numbers, from 0 on or from -1 back, such as (20, -1)")
    return tuple(map(int, steps))
