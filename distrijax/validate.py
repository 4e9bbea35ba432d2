"""Checks of values that a user gives: each returns the value in one form, or raises a DistriError of one sentence."""

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
    """The member of `kind` called `value`; raises DistriError that lists the allowed names."""
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise DistriError(f"{name} is {value!r}; use one of: {allowed}") from None


def positive(value: Any, name: str, *, least: int = 1) -> int:
    """`value` as an int of at least `least`, whatever library it is a whole number of; raises DistriError otherwise."""
    value = scalar(value)
    if not is_whole(value) or value < least:
        raise DistriError(f"{name} is {value!r}; give a whole number of at least {least}")
    return int(value)


def scalar(value: Any) -> Any:
    """The Python number in a scalar of numpy's, or in any library's array without dimensions; all else as it is."""
    try:
        return value.item() if getattr(value, "ndim", None) == 0 else value
    except (AttributeError, NotImplementedError):  # no array, or an array of keys
        return value


def is_whole(value: Any) -> bool:
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
