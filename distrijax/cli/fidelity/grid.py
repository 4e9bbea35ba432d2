"""The grid of settings that `distrijax evaluate` compares.

A setting is a dictionary of DistriConfig's keyword arguments, without those that have no effect in it: `sync_mode` has none
with naive_patch and tensor, and one device is described by `devices` alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from distrijax import Compression, Parallelism, SplitScheme, SyncMode

Setting = dict[str, Any]

ONE_DEVICE: Setting = {"devices": 1}
"""The reference of every other setting."""

NONE = "none"
"""The text of None and of an empty tuple."""


def _patches(setting: Setting) -> bool:
    return setting["parallelism"] == Parallelism.PATCH


def _naive(setting: Setting) -> bool:
    return setting["parallelism"] == Parallelism.NAIVE_PATCH


def _displaced(setting: Setting) -> bool:
    return _patches(setting) and setting["sync_mode"] != SyncMode.FULL_SYNC


def _renewed(setting: Setting) -> bool:
    return _displaced(setting) and setting["sync_mode"] != SyncMode.NO_SYNC


def _steps(given: str) -> tuple[int, ...]:
    """Parses a value of --sync-steps: numbers of steps, separated by spaces."""
    return () if given == NONE else tuple(map(int, given.split()))


def _compression(given: str) -> Compression | None:
    """Parses a value of --compress."""
    return None if given == NONE else Compression(given)


class Axis(NamedTuple):
    """A field of DistriConfig, with the flag and the column of that name.

    Attributes:
        field: Name of the field.
        values: Default values of the flag.
        help: Help of the flag.
        applies: Whether the field has an effect in a setting.
        words: Text of a value in the label of a setting; "" leaves it out.
        read: Parses a value from the command line; None uses the type of the values.
        bare: Value of the flag without an argument; empty where it needs one.
    """

    field: str
    values: tuple[Any, ...]
    help: str
    applies: Callable[[Setting], bool] = lambda setting: True
    words: Callable[[str], str] = str
    read: Callable[[str], Any] | None = None
    bare: tuple[Any, ...] = ()

    @property
    def kind(self) -> type:
        return type(self.values[0])


AXES = (
    Axis(
        "parallelism",
        tuple(Parallelism),
        "how the UNet is divided",
        words=lambda value: "" if value == "patch" else value,
    ),
    Axis("sync_mode", tuple(SyncMode), "what patches exchange after the warm-up", _patches),
    Axis(
        "extrapolate",
        (False,),
        "publish predictions of the next step",
        _renewed,
        words=lambda value: "extrapolated" if value == "True" else "",
    ),
    Axis(
        "compress",
        (None,),
        "compression of keys and values: none, int8 (the flag by itself) or int4",
        _displaced,
        words=lambda value: "" if value == NONE else value,
        read=_compression,
        bare=(Compression.INT8,),
    ),
    Axis("split_scheme", tuple(SplitScheme), "how naive_patch splits the image", _naive),
    Axis("warmup_steps", (4,), "exact steps after the first", _displaced, "warm-up {}".format),
    Axis(
        "sync_steps",
        ((),),
        "further exact steps: none, -1 for the last, '20 -1' for two",
        _displaced,
        words=lambda value: "" if value == NONE else f"exact steps {value}",
        read=_steps,
    ),
    Axis(
        "split_batch",
        (False,),
        "run each guidance branch on half of the devices (CFG split)",
        words=lambda value: "CFG split" if value == "True" else "no CFG split",
    ),
    Axis("devices", (2, 4, 8), "numbers of devices"),
)
"""In the order of the table's columns; the last axis varies fastest."""


def settings(chosen: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """One device, then every distinct setting of the chosen values; other axes have their default values.

    Args:
        chosen: Field of DistriConfig to values; an empty sequence stands for the flag without an argument (`Axis.bare`).
    """
    axes = [chosen.get(axis.field, axis.values) or axis.bare for axis in AXES]
    grid = [ONE_DEVICE]
    for values in itertools.product(*axes):
        full = dict(zip((axis.field for axis in AXES), values, strict=True))
        setting = {axis.field: full[axis.field] for axis in AXES if axis.applies(full)}
        if setting not in grid:
            grid.append(setting)
    return grid


def text(value: Any) -> str:
    """A value or a figure as text in the table.

    Args:
        value: A float is given with six digits; None and the empty tuple as `NONE`; a tuple's items are separated by spaces.
    """
    if value is None or isinstance(value, tuple):
        return " ".join(map(str, value or ())) or NONE
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def label(setting: Mapping[str, Any], axes: Sequence[Axis] = AXES) -> str:
    """A setting in words, from the given axes: "naive_patch row, warm-up 4".

    Args:
        setting: A setting, or its row in the table.
        axes: Axes to name; `devices` never is.
    """
    words = [
        axis.words(text(setting[axis.field])) for axis in axes if axis.field != "devices" and axis.field in setting
    ]
    return ", ".join(word for word in words if word)


def folder_name(setting: Mapping[str, Any]) -> str:
    """Folder name of a setting: every field that is not empty, with its value.

    Args:
        setting: A setting, or its row in the table.
    """
    values = {axis.field: text(setting.get(axis.field, "")) for axis in AXES}
    return ",".join(f"{field}={value}" for field, value in values.items() if value)
