"""Ctrl-C: in commands it ends the process at once, in a user's script it is not lost.

Python runs the handler of a signal between two instructions of the main thread, so not while XLA computes there; and an exception
that a handler raises within a finalizer or a callback of the garbage collector, of which JAX has one, is printed and forgotten. In
commands (`end_on_interrupt`) a thread therefore ends the process, after it has undone what was being written (`undone`). This
module imports nothing that takes time, so that commands can call it first.
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
"""How a command exits after Ctrl-C."""

PATIENCE = 2.0
"""Seconds that undoing may take before the process ends all the same."""

AGAIN = 0.5
"""Seconds after which another SIGINT is another press: a launcher may send one to a group, and its leader hand it on."""

_undoing: list[Callable[[], None]] = []
_standing = threading.Event()


@contextlib.contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Has a command that is interrupted meanwhile call `undo`. It may run in another thread and must not wait for this one."""
    _undoing.append(undo)
    try:
        yield
    finally:
        _undoing.remove(undo)


def end_on_interrupt() -> None:
    """Has Ctrl-C end this process with one line on stderr and exit code 130; for commands, before their imports.

    Does nothing where SIGINT is ignored, as in the background of a shell's script.
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
    """Raises a KeyboardInterrupt again that Python would forget, because it came within a finalizer or JAX's callback."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _interrupt_main_thread).start()  # here it would be lost again
        else:
            before(unraisable)

    if threading.current_thread() is threading.main_thread():  # no other thread is interrupted
        sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def _interrupt_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def _stand_still(number: int, frame: FrameType | None) -> None:
    """Keeps the main thread from writing more while another one undoes what it wrote."""
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
    _standing.wait(0.3)  # unless it is inside XLA
    for undo in reversed(_undoing):
        with contextlib.suppress(Exception):
            undo()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
