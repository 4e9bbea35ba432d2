"""A model's config from three sources: what shapes tell, what its family has, and what the user says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrijax.convert.tensors import Shape, Tensors
from distrijax.errors import DistriError

WHOLE = ("_class_name", "architectures")
"""Keys of a config that came from a folder, so that a key it lacks has its default and not the family's value."""


def shape_of(tensors: Tensors, name: str, what: str, *ranks: int) -> Shape:
    """The shape of a tensor; raises DistriError where it is absent or of another rank than those allowed."""
    if name not in tensors:
        raise DistriError(f"{what} lacks the tensor {name}; give a whole file of a supported model")
    shape = tensors[name].shape
    if len(shape) not in ranks:
        raise DistriError(
            f"{what}: {name} is {list(shape)} and has {' or '.join(map(str, ranks))} dimensions in a supported model; "
            "use another model"
        )
    return shape


def settle(
    part: str, told: Mapping[str, Any], family: Mapping[str, Any], given: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """The config of one part.

    told: by the shapes; None where they say nothing of a block. family: the config of the model the family is known by;
    what it says in other words (2 for [2, 2]) stays. given: by the user, a whole config or some of its keys.
    Raises DistriError where what is given is not what the shapes tell, and for a key that nobody tells.
    """
    base = {} if any(key in given for key in WHOLE) else family
    config = {**base, **given}
    for key, value in told.items():
        if key in given and not agree(given[key], value):
            raise DistriError(
                f"{what}: {key} of the {part} is {spoken(value)} by the tensors' shapes and {given[key]!r} by the given config; "
                "correct the config or leave it out"
            )
        if not agree(config.get(key), value):
            config[key] = spoken(value)
    unknown = [key for key, value in config.items() if value is UNKNOWN]
    if unknown:
        raise DistriError(
            f"{what}: {', '.join(unknown)} of the {part} can't be told from the tensors' shapes in a model of this size; "
            "give the configs it was made with (--config FOLDER)"
        )
    return config


UNKNOWN = object()
"""The value of a key that only the user can tell."""


def agree(one: Any, other: Any) -> bool:
    """Whether two values of a config say the same: a number stands for a list of it, None in a list for anything."""
    lists = [value for value in (one, other) if isinstance(value, list | tuple)]
    if not lists:
        return one == other
    length = len(lists[0])
    first, second = (list(value) if isinstance(value, list | tuple) else [value] * length for value in (one, other))
    return len(first) == len(second) and all(
        a == b or None in (a, b) for a, b in zip(first, second, strict=True)
    )  # fmt: skip


def spoken(value: Any) -> Any:
    """What stands in the config: of a list that leaves blocks out the one number that fits all, or 1 for those."""
    if not isinstance(value, list) or None not in value:
        return value
    known = {each for each in value if each is not None}
    return known.pop() if len(known) == 1 else [1 if each is None else each for each in value]
