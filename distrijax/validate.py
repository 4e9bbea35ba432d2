"""Checks of users' values. Each returns the value in one form, or raises a DistriError."""

from __future__ import annotations

import enum
import math
import numbers
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from distrijax.errors import DistriError

Choice = TypeVar("Choice", bound=enum.StrEnum)


def choose(kind: type[Choice], value: str, name: str) -> Choice:
    """The member of `kind` called `value`; otherwise raises DistriError, which lists the allowed names."""
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise DistriError(f"{name} is {value!r}; use one of: {allowed}") from None


def positive(value: Any, name: str, *, least: int = 1) -> int:
    """`value` as an int, if it is a whole number of at least `least`, of any library; otherwise raises DistriError."""
    value = scalar(value)
    if not is_whole(value) or value < least:
        raise DistriError(f"{name} is {value!r}; give a whole number of at least {least}")
    return int(value)


def scalar(value: Any) -> Any:
    """The Python number of a NumPy scalar, or of any library's array without dimensions; any other value as it is."""
    try:
        return value.item() if getattr(value, "ndim", None) == 0 else value
    except (AttributeError, NotImplementedError):  # not an array, or an array of random keys
        return value


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer; a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def flag(value: Any, name: str) -> bool:
    """`value` as a bool; raises DistriError if it is not one."""
    value = scalar(value)
    if not isinstance(value, bool):
        raise DistriError(f"{name} is {value!r}; use true or false")
    return value


def finite_number(value: Any, name: str, *, least: float = -math.inf) -> float:
    """`value` as a float, if it is a finite number of at least `least`; otherwise raises DistriError."""
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" of at least {least}"
        raise DistriError(f"{name} is {value!r}; give a finite number{bound}")
    return float(value)


def host_array(value: Any, name: str) -> Float[np.ndarray, "..."]:
    """An array of any library as float32 on the host. Raises DistriError if it is not an array of finite numbers."""
    if value is None:
        raise DistriError(f"{name} is None; give an array of numbers")
    try:
        # NumPy cannot read torch's bfloat16
        array = np.asarray(value.detach().cpu().float() if hasattr(value, "detach") else value)
        real = array.astype(np.float32, casting="unsafe" if array.dtype.kind != "c" else "safe")
    except (TypeError, ValueError):
        raise DistriError(f"{name} is {value!r:.60}; give an array of numbers") from None
    if not np.isfinite(real).all():
        raise DistriError(f"{name} contains NaN or infinity; give finite numbers")
    return real


def check_file(path: Path, flag: str) -> None:
    """Raises DistriError if the file that a flag names cannot be written; to be called before anything is loaded."""
    if path.is_dir():
        raise DistriError(f"{flag} {path} is a folder; give the name of a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise DistriError(f"{flag} {path} cannot be written ({error.strerror}); choose another folder") from None


def per_block(value: Any, blocks: int, name: str) -> tuple:
    """A tuple with one value for each block; a single value is repeated. Raises DistriError if its length is wrong."""
    values = value if isinstance(value, tuple) else (value,) * blocks
    if len(values) != blocks:
        raise DistriError(
            f"{name} has {len(values)} entries for {blocks} blocks; give one value, or one for each block"
        )
    return values


def check_choice(value: Any, allowed: tuple, name: str) -> None:
    """Raises DistriError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise DistriError(f"{name} is {value!r}; supported: {', '.join(map(repr, allowed))}")
