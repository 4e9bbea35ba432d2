"""A type checker for jaxtyping's import hook that looks at arrays alone.

Shapes, dtypes and "is this an array" are checked in the test files that conftest.py names. Other annotations are not: the library
refuses wrong input itself, with sentences that have their own tests, and takes a string for the member of an enum.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

import jax
from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable) -> Callable:
    """`function`, which raises when an argument or a result annotated as an array is something else."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if mentions_array(hint)}
    return beartype(function)


def mentions_array(hint: object) -> bool:
    """Whether a type annotation is of arrays, or of something made of arrays."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray | jax.Array):
        return True
    return any(map(mentions_array, typing.get_args(hint)))
