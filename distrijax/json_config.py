"""Configurations in JSON files, as diffusers and transformers write them, read into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from distrijax.errors import DistriError


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


JSON = 32 << 20
"""Characters of a JSON file: those of a tokenizer are 4 million."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises DistriError when there is none or it is not one."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(JSON + 1)
        if len(text) > JSON:
            raise ValueError(f"it has more than {JSON} characters")
        content = json.loads(text)
    except FileNotFoundError:
        raise DistriError(f"{path} does not exist; give a folder in the diffusers layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DistriError(f"{path} is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise DistriError(f"{path} holds a {type(content).__name__}; a JSON object is needed; fetch the file again")
    return content
