"""Ctrl-C: commands end at once, and users' scripts always get their KeyboardInterrupt.

Python runs a signal handler between two instructions of the main thread, so not while that thread is inside XLA. An exception
that a handler raises within a finalizer or a garbage collector's callback (JAX has one) is printed and dropped. In commands
(`end_on_interrupt`) another thread therefore ends the process, after it has undone unfinished writes (`undone`). This module has
only fast imports, so that commands can call it first.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command after Ctrl-C."""

PATIENCE = 2.0
"""Seconds for undoing, after which the process ends anyway."""

AGAIN = 0.5
"""Seconds after which another SIGINT is a second Ctrl-C; a launcher and a group's leader may both send the first."""

_undoing: list[Callable[[], None]] = []
_standing = threading.Event()


@contextlib.contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Calls `undo` if the command is interrupted within the context.

    Args:
        undo: Called in another thread, perhaps; it must not wait for the calling one.
    """
    _undoing.append(undo)
    try:
        yield
    finally:
        _undoing.remove(undo)


def end_on_interrupt() -> None:
    """Makes Ctrl-C end this process with one line on stderr and exit code 130; commands call it before their imports.

    It has no effect where SIGINT is ignored, as in background jobs of a shell script.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, _stand_still)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_signal, args=(reading,), name="interrupts", daemon=True).start()


@contextlib.contextmanager
def not_lost() -> Iterator[None]:
    """Raises a KeyboardInterrupt again if Python dropped it because it came within a finalizer or JAX's callback."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _interrupt_main_thread).start()  # raised here, it would be dropped again
        else:
            before(unraisable)

    if threading.current_thread() is threading.main_thread():  # only this thread gets KeyboardInterrupt
        sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def _interrupt_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def _stand_still(number: int, frame: FrameType | None) -> None:
    """Stops the main thread, so that it writes no more while another thread undoes its writes."""
    _standing.set()
    threading.Event().wait()


def _end_at_signal(reading: int) -> None:
    """Ends the process at the first SIGINT, at once at the second. The pipe has a byte for each signal that Python handles."""
    while signal.SIGINT not in os.read(reading, 64):
        pass
    undoing = threading.Thread(target=_undo_all, name="undoing", daemon=True)
    undoing.start()
    begun = time.monotonic()
    while undoing.is_alive() and (waited := time.monotonic() - begun) < PATIENCE:
        if select.select([reading], [], [], 0.02)[0] and signal.SIGINT in os.read(reading, 64) and waited > AGAIN:
            break
    os._exit(INTERRUPTED)


def _undo_all() -> None:
    with contextlib.suppress(OSError):  # no stderr
        os.write(2, b"\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    _standing.wait(0.3)  # it does not if it is inside XLA
    for undo in reversed(_undoing):
        with contextlib.suppress(Exception):
            undo()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
