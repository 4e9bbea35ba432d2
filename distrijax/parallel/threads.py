"""Threads for what would keep the main thread from seeing Ctrl-C: compiling, and waiting for devices.

Python raises KeyboardInterrupt between two instructions of the main thread, so never while it is inside XLA. What takes long
runs in threads here, and the main thread waits for a Python lock, which Ctrl-C interrupts. The threads are daemons: at exit
Python does not wait for them. `_finish` does, unless the script was interrupted.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

import jax

Result = TypeVar("Result")

_busy: set[threading.Thread] = set()
"""The threads that run something."""


class Tasks:
    """Runs functions in short-lived threads, in the order in which they were submitted, at most `limit` at a time."""

    def __init__(self, limit: int):
        self._slots = threading.Semaphore(limit)
        self._waiting: collections.deque[tuple[Future, Callable, tuple]] = collections.deque()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """The result to be, or the exception, of `function(*arguments)`."""
        future: Future[Result] = Future()
        self._waiting.append((future, function, arguments))
        _start(self._work)
        return future

    def _work(self) -> None:
        """Runs what waits, whoever submitted it: an interrupt between the two lines of `submit` then loses nothing."""
        with self._slots, contextlib.suppress(IndexError):
            while True:
                _run(*self._waiting.popleft())


@functools.cache
def compilers(limit: int) -> Tasks:
    """The threads that compile for all pipelines of this process."""
    return Tasks(limit)


def wait(arrays: Result) -> Result:
    """`jax.block_until_ready`, which Ctrl-C interrupts."""
    if threading.current_thread() is not threading.main_thread() or _ready(arrays):
        return jax.block_until_ready(arrays)
    return interruptible(jax.block_until_ready, arrays)


def _ready(arrays: Any) -> bool:
    """Whether all is known to be there; random keys do not tell."""
    return all(getattr(leaf, "is_ready", bool)() for leaf in jax.tree.leaves(arrays))


def interruptible(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)` in a thread of its own, so that Ctrl-C interrupts the wait for it, though not the function."""
    future: Future[Result] = Future()
    _start(_run, future, function, arguments)
    return future.result()


def _start(function: Callable, *arguments: Any) -> None:
    def work() -> None:
        try:
            function(*arguments)
        finally:
            _busy.discard(thread)

    thread = threading.Thread(target=work, name="distrijax", daemon=True)
    _busy.add(thread)
    thread.start()


def _run(future: Future, function: Callable, arguments: tuple) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
            del future  # which has the exception, whose traceback has this frame


@atexit.register
def _finish() -> None:
    """Waits for the threads before Python ends; after an interrupt that nobody caught, or at another one, ends at once."""
    try:
        if getattr(sys, "last_type", None) is not KeyboardInterrupt:
            for thread in list(_busy):
                thread.join()
        elif _busy:
            _end_as_interrupted()
    except KeyboardInterrupt:
        _end_as_interrupted()


def _end_as_interrupted() -> NoReturn:
    """Ends the process as Python does after an uncaught KeyboardInterrupt, without what XLA's threads would have to agree to."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)  # where SIGINT is blocked
