"""Which version of a file or folder something was made with."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from distrijax.convert.layouts.folder import ORBAX
from distrijax.models.families import PARTS
from distrijax.weights.hub import commit_of


def version_of(path: Path) -> str:
    """The version of a model's file or folder: the commit of what is from the hub, else bytes and time of the last change.

    Args:
        path: A file, a folder in the diffusers layout, or the folder of one model.
    """
    if commit := commit_of(path):
        return f"commit {commit}"
    states = [file.stat() for file in _files(path)]
    changed = datetime.fromtimestamp(max((state.st_mtime for state in states), default=0), UTC)
    return f"{sum(state.st_size for state in states)} bytes of {changed.isoformat()}"


def _files(path: Path) -> Iterator[Path]:
    """The files that a model may be read from; a folder may also hold others, such as results."""
    if path.is_file():
        yield path
        return
    inside = (path.glob("*"), *((path / part).rglob("*") for part in (*PARTS, ORBAX)))
    for entries in inside:
        yield from (entry for entry in entries if entry.is_file())
