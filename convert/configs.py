"""The config of a model, merged from what its tensors' shapes imply, what its family has, and what the user gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrijax.errors import CheckpointError
from distrijax.weights.tensors import Shape, Tensors

WHOLE = ("_class_name", "architectures")
"""Keys of a config that came from a folder, so that a key it lacks has its default and not the family's value."""

UNKNOWN = object()
"""The value of a key that only the user knows."""


def shape_of(tensors: Tensors, name: str, what: str, *ranks: int) -> Shape:
    """The shape of a tensor; raises CheckpointError where it is absent or of another rank than those allowed."""
    if name not in tensors:
        raise CheckpointError(f"{what} lacks the tensor {name}; give a whole file of a supported model")
    shape = tensors[name].shape
    if len(shape) not in ranks:
        raise CheckpointError(
            f"{what}: {name} is {list(shape)} and has {' or '.join(map(str, ranks))} dimensions in a supported model; "
            "use another model"
        )
    return shape


def merge_configs(
    part: str, inferred: Mapping[str, Any], family: Mapping[str, Any], given: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """The config of one part.

    Args:
        part: Its name, for errors.
        inferred: From the shapes; None in a list for a block that they say nothing about.
        family: The config of the model that the family is known by. A value that means the same (2 for [2, 2]) stays.
        given: By the user, a whole config or some of its keys.
        what: The file, for errors.

    Raises:
        CheckpointError: If the given config contradicts the shapes, and for a key whose value is not known.
    """
    base = {} if any(key in given for key in WHOLE) else family
    config = {**base, **given}
    for key, value in inferred.items():
        if key in given and not compatible(given[key], value):
            raise CheckpointError(
                f"{what}: {key} of the {part} is {to_json_value(value)} by the tensors' shapes and {given[key]!r} by the "
                "given config; correct the config or leave it out"
            )
        if not compatible(config.get(key), value):
            config[key] = to_json_value(value)
    if unknown := [key for key, value in config.items() if value is UNKNOWN]:
        raise CheckpointError(
            f"{what}: {', '.join(unknown)} of the {part} can't be inferred from the tensors' shapes in a model of this size; "
            "give the configs it was made with (--config FOLDER)"
        )
    return config


def compatible(one: Any, other: Any) -> bool:
    """Whether two values of a config mean the same: a number stands for a list of it, None in a list for anything."""
    lists = [value for value in (one, other) if isinstance(value, list | tuple)]
    if not lists:
        return one == other
    first, second = (list(v) if isinstance(v, list | tuple) else [v] * len(lists[0]) for v in (one, other))
    return len(first) == len(second) and all(a == b or None in (a, b) for a, b in zip(first, second, strict=True))


def to_json_value(value: Any) -> Any:
    """What the config holds: for a list that leaves blocks out the one number that fits all, or 1 for those blocks."""
    if not isinstance(value, list) or None not in value:
        return value
    known = {each for each in value if each is not None}
    return known.pop() if len(known) == 1 else [1 if each is None else each for each in value]
