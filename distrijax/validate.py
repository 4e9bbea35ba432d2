"""Checks of users' values. Each returns the value in one form, or raises a DistriError."""

from __future__ import annotations

import difflib
import enum
import math
import numbers
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from distrijax.errors import InvalidArgument

Choice = TypeVar("Choice", bound=enum.StrEnum)


def choose(kind: type[Choice], value: str, name: str) -> Choice:
    """Returns the member of `kind` called `value`.

    Args:
        kind: An enumeration of strings.
        value: The name of a member.
        name: What the value is called in the error.

    Raises:
        InvalidArgument: For any other name; the error lists the allowed ones.
    """
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(member.value for member in kind)
        raise InvalidArgument(f"{name} is {value!r}; use one of: {allowed}") from None


def positive(value: Any, name: str, *, least: int = 1) -> int:
    """Returns `value` as an int.

    Args:
        value: A whole number of any library.
        name: What the value is called in the error.
        least: The smallest that is allowed.

    Raises:
        InvalidArgument: For anything else.
    """
    value = scalar(value)
    if not is_whole(value) or value < least:
        raise InvalidArgument(f"{name} is {value!r}; give a whole number of at least {least}")
    return int(value)


def scalar(value: Any) -> Any:
    """The Python number of a NumPy scalar, or of any library's array without dimensions; any other value as it is.

    Args:
        value: As a caller gave it.
    """
    try:
        return value.item() if getattr(value, "ndim", None) == 0 else value
    except (AttributeError, NotImplementedError):  # not an array, or an array of random keys
        return value


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer; a bool is not.

    Args:
        value: NumPy's integers count too.
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def flag(value: Any, name: str) -> bool:
    """Returns `value` as a bool.

    Args:
        value: A bool of any library.
        name: What the value is called in the error.

    Raises:
        InvalidArgument: For anything else.
    """
    value = scalar(value)
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} is {value!r}; use true or false")
    return value


def finite_number(value: Any, name: str, *, least: float = -math.inf) -> float:
    """Returns `value` as a float.

    Args:
        value: A real number of any library.
        name: What the value is called in the error.
        least: The smallest that is allowed.

    Raises:
        InvalidArgument: For anything else, and for NaN and infinity.
    """
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" of at least {least}"
        raise InvalidArgument(f"{name} is {value!r}; give a finite number{bound}")
    return float(value)


def host_array(value: Any, name: str) -> Float[np.ndarray, "..."]:
    """Returns an array as float32 on the host.

    Args:
        value: An array of any library, of any shape.
        name: What the value is called in the error.

    Raises:
        InvalidArgument: If it is not an array of finite numbers.
    """
    if value is None:
        raise InvalidArgument(f"{name} is None; give an array of numbers")
    try:
        # NumPy cannot read torch's bfloat16
        array = np.asarray(value.detach().cpu().float() if hasattr(value, "detach") else value)
        real = array.astype(np.float32, casting="unsafe" if array.dtype.kind != "c" else "safe")
    except (TypeError, ValueError):
        raise InvalidArgument(f"{name} is {value!r:.60}; give an array of numbers") from None
    if not np.isfinite(real).all():
        raise InvalidArgument(f"{name} contains NaN or infinity; give finite numbers")
    return real


def check_file(path: Path, flag: str) -> None:
    """Checks that a file can be written; to be called before anything is loaded.

    Args:
        path: The file.
        flag: The flag that names it.

    Raises:
        InvalidArgument: If the file cannot be written.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # of the folder, below
    except OSError as error:  # a name that the file system does not take
        raise InvalidArgument(
            f"{flag} {path.name:.40}... cannot be written ({error.strerror}); choose another name"
        ) from None
    if path.is_dir():
        raise InvalidArgument(f"{flag} {path} is a folder; give the name of a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InvalidArgument(f"{flag} {path} cannot be written ({error.strerror}); choose another folder") from None


def per_block(value: Any, blocks: int, name: str) -> tuple:
    """Returns a tuple with one value for each block.

    Args:
        value: A tuple with one value for each block, or a single value, which is repeated.
        blocks: Number of blocks.
        name: What the value is called in the error.

    Raises:
        InvalidArgument: If the tuple's length is wrong.
    """
    values = value if isinstance(value, tuple) else (value,) * blocks
    if len(values) != blocks:
        raise InvalidArgument(
            f"{name} has {len(values)} entries for {blocks} blocks; give one value, or one for each block"
        )
    return values


def check_choice(value: Any, allowed: tuple, name: str) -> None:
    """Checks that a value is one of the allowed ones.

    Args:
        value: A value.
        allowed: The allowed ones.
        name: What the value is called in the error.

    Raises:
        InvalidArgument: If it is none of them.
    """
    if value not in allowed:
        raise InvalidArgument(f"{name} is {value!r}; supported: {', '.join(map(repr, allowed))}")


def check_argument(name: Any, names: Iterable[str], what: str) -> None:
    """Checks that there is an argument of a name.

    Args:
        name: As a caller gave it.
        names: Of all arguments.
        what: Whose they are, for the error.

    Raises:
        InvalidArgument: If there is none; the error tells the nearest one.
    """
    names = tuple(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise InvalidArgument(f"{what} has no argument {name!s:.60}; {advice}")
