"""Frozen, validated configuration: how a run is spread over devices, and what the models look like."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import numbers
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from jaxtyping import Float


class DistriError(ValueError):
    """Bad input, told in one sentence: what was got, what is allowed, what to do."""


class DistriWarning(UserWarning):
    """Something asked for could not be honoured in full; the picture is made all the same."""


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


Choice = TypeVar("Choice", bound=enum.StrEnum)


def choose(kind: type[Choice], value: str, name: str) -> Choice:
    """The member of `kind` called `value`; raises DistriError that lists the allowed names."""
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise DistriError(f"{name} is {value!r}; use one of: {allowed}") from None


def positive(value: Any, name: str, *, least: int = 1) -> int:
    """`value` as an int of at least `least`, whatever library it is a whole number of; raises DistriError otherwise."""
    value = scalar(value)
    if not _is_whole(value) or value < least:
        raise DistriError(f"{name} is {value!r}; give a whole number of at least {least}")
    return int(value)


def scalar(value: Any) -> Any:
    """The Python number in a scalar of numpy's, or in any library's array without dimensions; all else as it is."""
    try:
        return value.item() if getattr(value, "ndim", None) == 0 else value
    except (AttributeError, NotImplementedError):  # no array, or an array of keys
        return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def flag(value: Any, name: str) -> bool:
    """`value` as a bool; raises DistriError for what is neither true nor false."""
    value = scalar(value)
    if not isinstance(value, bool):
        raise DistriError(f"{name} is {value!r}; use true or false")
    return value


def finite_number(value: Any, name: str, *, least: float = -math.inf) -> float:
    """`value` as a float of at least `least`; raises DistriError for NaN, infinity and what is no number."""
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" of at least {least}"
        raise DistriError(f"{name} is {value!r}; give a finite number{bound}")
    return float(value)


def host_array(value: Any, name: str) -> Float[np.ndarray, "..."]:
    """A caller's array as float32 on the host; torch's of any dtype, too. Raises DistriError for what is no array of numbers."""
    if value is None:
        raise DistriError(f"{name} is None; give an array of numbers")
    try:
        # numpy knows no bfloat16 of torch's
        array = np.asarray(value.detach().cpu().float() if hasattr(value, "detach") else value)
        real = array.astype(np.float32, casting="unsafe" if array.dtype.kind != "c" else "safe")
    except (TypeError, ValueError):
        raise DistriError(f"{name} is {value!r:.60}; give an array of numbers") from None
    if not np.isfinite(real).all():
        raise DistriError(f"{name} has values that are not finite; give finite numbers")
    return real


def check_file(path: Path, flag: str) -> None:
    """Raises DistriError, before anything is loaded, where the file that a flag names could not be written."""
    if path.is_dir():
        raise DistriError(f"{flag} {path} is a folder; give the name of a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise DistriError(f"{flag} {path} cannot be written ({error.strerror}); choose another folder") from None


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
    if not all(map(_is_whole, steps)):
        raise DistriError(f"sync_steps is {value!r}; give whole numbers, from 0 on or from -1 back, such as (20, -1)")
    return tuple(map(int, steps))


class ModelConfig:
    """Mix-in for dataclasses that are read from a model's config.json.

    `INERT` names keys that change nothing at inference; `FIXED` names keys with the one value (or values) that
    this implementation computes. Everything else must be a field; an unknown key or value raises DistriError.
    """

    INERT: frozenset[str] = frozenset()
    FIXED: Mapping[str, tuple] = {}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a diffusers / transformers config; raises DistriError for what is not supported."""
        fields = {field.name for field in dataclasses.fields(cls)}
        chosen = {}
        for key, value in config.items():
            value = freeze(value)
            if key.startswith("_") or key in cls.INERT:
                continue
            if key in fields:
                chosen[key] = value
            elif key not in cls.FIXED:
                hint = difflib.get_close_matches(key, fields, 1)
                raise DistriError(
                    f"{cls.__name__}: unknown key {key!r} (value {value!r}){f', did you mean {hint[0]!r}' if hint else ''}; "
                    "remove it if it has no effect, or use a model of the Stable Diffusion family"
                )
            elif value not in cls.FIXED[key]:
                raise DistriError(
                    f"{cls.__name__}: {key} is {value!r}; supported: {', '.join(map(repr, cls.FIXED[key]))}"
                )
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in chosen]
        if missing:
            raise DistriError(f"{cls.__name__}: the config lacks {', '.join(missing)}; fetch the file again")
        return cls(**chosen)


def freeze(value: Any) -> Any:
    """Lists become tuples, so that a config can be hashed."""
    return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value


def per_block(value: Any, blocks: int, name: str) -> tuple:
    """One value for each block: a scalar is repeated; raises DistriError on a wrong length."""
    values = value if isinstance(value, tuple) else (value,) * blocks
    if len(values) != blocks:
        raise DistriError(f"{name} has {len(values)} entries for {blocks} blocks; give one, or one for each block")
    return values


def check_choice(value: Any, allowed: tuple, name: str) -> None:
    """Raises DistriError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise DistriError(f"{name} is {value!r}; supported: {', '.join(map(repr, allowed))}")
