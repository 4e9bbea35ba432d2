"""Converted models, kept in the user's cache folder by what went into them, so that each is converted once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from distrijax.atomic_write import atomic_write
from distrijax.convert.layouts.folder import MODELS, read_files, write_folder
from distrijax.convert.progress import with_progress
from distrijax.convert.sources import Found, Recipe, assemble
from distrijax.errors import DistriError

VERSION = 1
"""Of what conversion makes; raise it when the same sources give other tensors or files."""


def cache_folder() -> Path:
    """Where this project keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrijax"


class Prepared(NamedTuple):
    """What `from_pretrained` takes."""

    folder: Path
    variant: str | None


def prepared(recipe: Recipe, *, token: str | bool | None = None, offline: bool = False) -> Prepared:
    """A folder for `from_pretrained`: the source itself where it is one, or what it was converted to.

    token, offline: of the hub. Raises DistriError for sources that can't be had or converted.
    """
    found = Found.of(recipe, token=token, offline=offline)
    if recipe.plain and needs_no_conversion(found.source):
        return Prepared(found.source, recipe.variant)
    found.check_folders()
    destination = cache_folder() / "converted" / fingerprint(recipe, found)
    with _locked(destination):
        if not destination.exists():
            checkpoint, _ = assemble(recipe, found)
            with (
                atomic_write(destination, replace=False, durable=True) as beside,
                with_progress(checkpoint, "convert") as seen,
            ):
                write_folder(seen, beside)
    return Prepared(destination, None)


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """Of several processes on a host one converts, and the others wait."""
    with _writing(destination.parent):
        lock = FileLock(destination.with_suffix(".lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes a folder of the cache; raises DistriError where it, or what is written within, can't be had."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DistriError(
            f"{folder} can't be written ({error.strerror}); set XDG_CACHE_HOME to a folder with room for the model"
        ) from None


def needs_no_conversion(path: Path) -> bool:
    """Whether it is a folder in the diffusers layout whose weights are all safetensors."""
    if not (path / "model_index.json").is_file():
        return False
    models = [path / part for part in MODELS if (path / part / "config.json").is_file()]
    return all(any(model.glob("*.safetensors")) for model in models)


def fingerprint(recipe: Recipe, found: Found) -> str:
    """The same for the same contents and wishes, wherever the files are."""
    paths = [None if path is None else digest(path) for path in found.paths]
    configs, files = read_files(found.config) if found.config else ({}, {})
    given = [configs, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}]
    words = [word or path.stem for path, (_, word) in zip(found.embeddings, recipe.embeddings, strict=True)]
    wishes = [recipe.variant, recipe.ema, recipe.prediction_type, [weight for _, weight in recipe.loras], words]
    return hashlib.sha256(json.dumps([VERSION, paths, given, wishes]).encode()).hexdigest()[:32]


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names; remembered while size and time of change are the same."""
    if path.is_dir():
        inside = sorted(each for each in path.rglob("*") if each.is_file() and not _hidden(each.relative_to(path)))
        listing = [[each.relative_to(path).as_posix(), digest(each)] for each in inside]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    status = path.stat()
    identity = json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino])
    memo = cache_folder() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    if memo.is_file():
        return memo.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with _writing(memo.parent):
        beside = memo.with_suffix(f".{os.getpid()}")
        beside.write_text(found)
        beside.replace(memo)
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
