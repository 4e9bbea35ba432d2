"""Reads the JSON configurations of diffusers and transformers into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from distrijax.errors import CheckpointError, checkpoint_errors, warn


class ModelConfig:
    """Mix-in for dataclasses that are read from a model's config.json.

    A key that is neither a field nor listed in one of the attributes has no effect.

    Attributes:
        INERT: Keys that have no effect at inference.
        FIXED: Keys that are not fields, with the values that this implementation supports.
    """

    INERT: frozenset[str] = frozenset()
    FIXED: Mapping[str, tuple] = {}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Creates an instance from the content of a config.json. Keys with a leading underscore are ignored.

        Warns once of each unknown key.

        Args:
            config: Key to JSON value; lists become tuples.

        Raises:
            CheckpointError: A key is missing or is nearly the name of a field, or a value is not supported.
        """
        fields = frozenset(field.name for field in dataclasses.fields(cls))
        chosen = {}
        for key, value in config.items():
            value = freeze(value)
            if key.startswith("_") or key in cls.INERT:
                continue
            if key in fields:
                chosen[key] = value
            elif key not in cls.FIXED:
                _warn_of_unknown(cls.__name__, key, fields)
            elif value not in cls.FIXED[key]:
                raise CheckpointError(
                    f"{cls.__name__}: {key} is {value!r}; supported: {', '.join(map(repr, cls.FIXED[key]))}"
                )
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in chosen]
        if missing:
            raise CheckpointError(f"{cls.__name__}: the config lacks {', '.join(missing)}; fetch the file again")
        with checkpoint_errors():
            return cls(**chosen)


@functools.cache  # the same config is read several times
def _warn_of_unknown(what: str, key: str, fields: frozenset[str]) -> None:
    """Warns of a key; raises CheckpointError for one that looks like a misspelled field."""
    if near := difflib.get_close_matches(key, fields, 1, cutoff=0.85):
        raise CheckpointError(f"{what}: unknown key {key!r}, did you mean {near[0]!r}; correct or remove it")
    warn(f"{what}: unknown key {key!r} has no effect; remove it, or check that the model does not need it")


def freeze(value: Any) -> Any:
    """Converts lists to tuples, so that a config is hashable.

    Args:
        value: A JSON value; lists are converted at every depth, objects stay as they are.
    """
    return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value


MAX_BYTES = 32 << 20
"""The largest JSON file that is read; a tokenizer's has 4 million characters."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file does not exist or does not contain one.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a folder in the diffusers layout") from None
    except OSError as error:
        raise CheckpointError(f"{path} is not readable ({error}); fetch the file again") from None
    return parse_json(data, str(path))


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in a file's content.

    Args:
        data: The content.
        what: The file, for errors.

    Raises:
        CheckpointError: If there is none.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{what} contains a {type(content).__name__} and must contain a JSON object; fetch the file again"
        )
    return content
