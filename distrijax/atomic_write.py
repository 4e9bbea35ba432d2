"""Atomic writes: a file or folder appears whole or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from distrijax.errors import DistriError, InvalidArgument
from distrijax.interrupts import undone

_numbers = itertools.count()


@contextmanager
def atomic_write(destination: Path, *, replace: bool = True, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `destination`, which is renamed to `destination` at the end of the context.

    An exception or an interrupt (Ctrl-C, SIGTERM, a closed terminal) removes the temporary path.

    Args:
        destination: The file or folder to write.
        replace: Whether it may replace an existing one, which stays until the new one is complete.
        durable: Whether to flush the new content to the disk before it is renamed.

    Raises:
        InvalidArgument: For a destination that exists and may not be replaced.
        DistriError: If it could not be written, as on a full disk.
    """
    if destination.exists() and not replace:
        raise InvalidArgument(f"{destination} exists; choose another name, or --force to replace it")
    number = (
        f"{threading.get_native_id()}-{next(_numbers)}"  # short, for a name may be as long as the file system takes
    )
    beside, old = (destination.with_name(f".{number}{end}") for end in (".new", ".old"))

    def restore() -> None:
        if old.exists() and not destination.exists():
            old.rename(destination)
        for path in (beside, old):
            remove(path)

    try:
        with undone(restore), _ended_by_signals():
            try:
                destination.parent.mkdir(parents=True, exist_ok=True)
                yield beside
                if durable:
                    _sync(beside)
                if destination.is_dir() or (destination.exists() and beside.is_dir()):  # a rename cannot replace these
                    destination.rename(old)
                beside.replace(destination)
            finally:
                restore()
    except OSError as error:
        raise DistriError(
            f"{destination} could not be written ({error.strerror or error}); make room or choose another"
        ) from None


def remove(path: Path) -> None:
    """Removes a file, or a folder with its content, if it exists.

    Args:
        path: A link is removed itself, never what it points to.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flushes a file, or a folder with its content, to the disk."""
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the stack, as Ctrl-C does; by default they end Python at once and leave the temporary path."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    fatal = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # no other thread can set handlers
        fatal = []
    for number in fatal:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in fatal:
            signal.signal(number, signal.SIG_DFL)
