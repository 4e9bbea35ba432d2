"""A file or folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from distrijax.errors import DistriError


@contextmanager
def appearing(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """A name beside `destination` to write to, which becomes `destination` when all is well; otherwise nothing is left of it.

    force: take the place of what is there, which stays until the new is whole. Raises DistriError for a destination that
    exists, and where the disk refuses. An interrupt (Ctrl-C, SIGTERM) leaves nothing, too.
    """
    if destination.exists() and not force:
        raise DistriError(f"{destination} exists; choose another name, or --force to replace it")
    beside, old = (destination.with_name(f".{destination.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        with _ended_by_sigterm():
            destination.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            _sync(beside)
            if destination.is_dir() or (destination.exists() and beside.is_dir()):  # which no rename replaces
                destination.rename(old)
            beside.replace(destination)
    except OSError as error:
        raise DistriError(
            f"{destination} could not be written ({error.strerror or error}); make room or choose another"
        ) from None
    finally:
        if old.exists() and not destination.exists():
            old.rename(destination)
        for path in (beside, old):
            remove(path)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Has the disk hold what was written before anything is renamed."""
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Has SIGTERM unwind the stack, as Ctrl-C does; Python would end at once and leave what it was writing."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
