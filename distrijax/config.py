"""The configuration of a run: how one image is distributed over devices. Frozen and validated."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Any

from distrijax.errors import InvalidArgument
from distrijax.validate import choose, finite_number, flag, is_whole, positive, scalar


class SyncMode(enum.StrEnum):
    """What patches exchange after the warm-up (`distrijax.parallel.displaced` has a class for each).

    Names are those of DistriFusion's `mode`, except for damped_async_gn and async_tokens, which DistriFusion does not have.
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
    """How naive_patch divides the image: into bands of rows, of columns, or of either in alternate steps."""

    ROW = "row"
    COLUMN = "column"
    ALTERNATE = "alternate"


class StepKind(enum.StrEnum):
    """What a denoising step reads of the rest of the image."""

    SYNCHRONOUS = "synchronous"
    """Values of this step: exact."""
    DISPLACED = "displaced"
    """Values that the step before published."""


class Compression(enum.StrEnum):
    """How keys and values are quantized for transfer after the warm-up: to 256 or 16 values for each channel of a patch."""

    INT8 = "int8"
    INT4 = "int4"


@dataclasses.dataclass(frozen=True)
class DistriConfig:
    """How one image is distributed over devices. Names are those of the original DistriFusion where it has them.

    Attributes:
        devices: How many devices to use, of those that JAX lists first; or the devices (`jax.Device`) themselves, kept as a
            tuple, so that several pipelines run side by side. None uses all that JAX lists.
        sync_mode: What patches exchange after the warm-up.
        warmup_steps: Synchronous steps after the first one, so `warmup_steps + 1` UNet calls are exact.
        sync_steps: Further synchronous steps, numbered from 0, or from the end: -1 is the last. Numbers beyond a call's steps
            are ignored.
        extrapolate: Whether devices publish a prediction of their next step's values instead of this step's, after the
            warm-up. The traffic is the same, the stale state twice as large.
        compress: How keys and values are compressed for transfer after the warm-up: to a half (int8) or a quarter (int4) of
            bfloat16's bytes, lossy. None does not compress.
        shard_weights: Whether each device holds an equal share of all large weights, and all-gathers each layer's shortly
            before its use. For devices with little memory and fast links.
        split_batch: Whether the unconditional and the conditional branch run on two halves of the mesh (CFG split).
        parallelism: How the UNet is divided. Only `patch` has displaced steps: `sync_mode` and `warmup_steps` have no effect
            with `naive_patch`, which exchanges no activations, and with `tensor`, which is exact.
        split_scheme: How naive_patch divides the image.
        data: Size of the mesh axis for different images; None lets the planner choose.
        cfg: Size of the mesh axis for guidance branches, 1 or 2; None lets the planner choose.
        patch: Size of the mesh axis for bands of rows; None lets the planner choose.

    Raises:
        InvalidArgument: A value is not allowed, or has no effect together with the others.
    """

    devices: int | Sequence[Any] | None = None
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
        for name in self._options_without_effect():
            patched = self.parallelism is Parallelism.PATCH
            mode = f"sync_mode={self.sync_mode}" if patched else f"parallelism={self.parallelism}"
            raise InvalidArgument(f"{name} is set and has no effect with {mode}; remove it or choose another mode")
        object.__setattr__(self, "devices", _devices(self.devices))
        for name in ("data", "cfg", "patch"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive(getattr(self, name), name))
        if self.cfg not in (None, 1, 2):
            raise InvalidArgument(f"cfg is {self.cfg}; guidance has two branches, use 1 or 2")
        if self.cfg == 2 and not self.split_batch:
            raise InvalidArgument(
                "cfg=2 splits the guidance branches and split_batch=False forbids it; remove one of the two"
            )

    @property
    def device_count(self) -> int | None:
        """How many devices to use; None if that is left open."""
        return len(self.devices) if isinstance(self.devices, tuple) else self.devices

    def _options_without_effect(self) -> list[str]:
        """The options that are set although there is no displaced step, or none that publishes anything new."""
        displaced = self.parallelism is Parallelism.PATCH and self.sync_mode is not SyncMode.FULL_SYNC
        effective = {
            "extrapolate": displaced and self.sync_mode is not SyncMode.NO_SYNC,
            "compress": displaced,
            "sync_steps": displaced,
        }
        return [name for name, used in effective.items() if getattr(self, name) and not used]

    def step_kinds(self, steps: int) -> list[StepKind]:
        """The kind of each step of a call, where the mode has displaced steps.

        Args:
            steps: Number of the call's steps.
        """
        further = {number % steps for number in self.sync_steps if -steps <= number < steps}
        return [
            StepKind.SYNCHRONOUS if number <= self.warmup_steps or number in further else StepKind.DISPLACED
            for number in range(steps)
        ]


def check_large(value: Any) -> str | tuple[tuple[float, float], ...]:
    """Checks a call's `large`; returns "off", "auto", or pairs (timestep, factor), timesteps descending.

    Args:
        value: What the caller gave.

    Raises:
        InvalidArgument: For anything else.
    """
    if value in ("off", "auto"):
        return value
    advice = "give 'off', 'auto', or pairs of a timestep and a factor, such as [(350, 0.25), (200, 0.5)]"
    try:
        pairs = [] if isinstance(value, str) else [tuple(pair) for pair in value]
    except TypeError:
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InvalidArgument(f"large is {value!r:.100}; {advice}")
    numbers = [tuple(finite_number(each, "large") for each in pair) for pair in pairs]
    for timestep, factor in numbers:
        if timestep < 0 or not 0 < factor < 1:
            raise InvalidArgument(
                f"large has the pair ({timestep:g}, {factor:g}); give timesteps of at least 0 and factors between 0 and 1"
            )
    return tuple(sorted(numbers, reverse=True))


def _devices(value: Any) -> int | tuple | None:
    """A number of devices as int, devices as a tuple; raises InvalidArgument for anything else."""
    if value is None or not isinstance(value, Iterable) or isinstance(value, str):
        return None if value is None else positive(value, "devices")
    devices = tuple(value)
    if not devices or not all(hasattr(device, "platform") for device in devices):
        raise InvalidArgument(f"devices is {value!r:.60}; give a number of devices, or some of jax.devices()")
    if len(set(devices)) < len(devices) or len({device.platform for device in devices}) > 1:
        raise InvalidArgument(f"devices is {list(devices)!r:.200}; give different devices of one platform")
    return devices


def _step_numbers(value: Any) -> tuple[int, ...]:
    """Numbers of steps as a tuple of int; raises InvalidArgument for anything else."""
    value = scalar(value)
    steps = tuple(map(scalar, value)) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not all(map(is_whole, steps)):
        raise InvalidArgument(
            f"sync_steps is {value!r}; give whole numbers, counted from 0 or back from -1, such as (20, -1)"
        )
    return tuple(map(int, steps))
