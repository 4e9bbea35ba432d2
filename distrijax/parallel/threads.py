"""Threads for calls that would block Ctrl-C in the main thread: compiling, and waiting for devices.

Python raises KeyboardInterrupt between two instructions of the main thread, so not while that thread is inside XLA. Here long
calls run in other threads, and the main thread waits for a Python lock, which Ctrl-C interrupts. The threads are daemons, so
Python does not wait for them at exit. `_finish` does, unless the script was interrupted.
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
"""The running threads."""


class Tasks:
    """Runs functions in short-lived threads, in the order in which they were submitted, at most `limit` at a time."""

    def __init__(self, limit: int):
        self._slots = threading.Semaphore(limit)
        self._waiting: collections.deque[tuple[Future, Callable, tuple]] = collections.deque()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Starts a function as soon as a thread is free.

        Args:
            function: Called once, in a thread of its own.
            arguments: Of the function.

        Returns:
            The future of its result.
        """
        future: Future[Result] = Future()
        self._waiting.append((future, function, arguments))
        _start(self._work)
        return future

    def _work(self) -> None:
        """Runs all waiting tasks, not just its own, so that an interrupt between the lines of `submit` loses none."""
        with self._slots, contextlib.suppress(IndexError):
            while True:
                _run(*self._waiting.popleft())


@functools.cache
def compilers(limit: int) -> Tasks:
    """The threads that compile for all pipelines of this process, at most `limit` at a time.

    Args:
        limit: Programs that compile at the same time; each limit has threads of its own.
    """
    return Tasks(limit)


def wait(arrays: Result) -> Result:
    """`jax.block_until_ready` that Ctrl-C can interrupt.

    Args:
        arrays: A pytree of arrays, which is returned.
    """
    if threading.current_thread() is not threading.main_thread() or _ready(arrays):
        return jax.block_until_ready(arrays)
    return interruptible(jax.block_until_ready, arrays)


def _ready(arrays: Any) -> bool:
    """Whether all arrays are known to be ready; random keys have no `is_ready`."""
    return all(getattr(leaf, "is_ready", bool)() for leaf in jax.tree.leaves(arrays))


def interruptible(function: Callable[..., Result], *arguments: Any) -> Result:
    """Runs a function in another thread and waits for it; Ctrl-C interrupts the wait, not the function.

    Args:
        function: The function.
        *arguments: Its arguments.

    Returns:
        Its result; its exception is raised.
    """
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
            del future  # else a reference cycle: its exception's traceback holds this frame


@atexit.register
def _finish() -> None:
    """Waits for the threads at exit; after an uncaught interrupt, or at another one, ends the process at once."""
    try:
        if getattr(sys, "last_type", None) is not KeyboardInterrupt:
            for thread in list(_busy):
                thread.join()
        elif _busy:
            _end_as_interrupted()
    except KeyboardInterrupt:
        _end_as_interrupted()


def _end_as_interrupted() -> NoReturn:
    """Ends the process as Python does after an uncaught KeyboardInterrupt, but without waiting for XLA's threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(128 + signal.SIGINT)  # if SIGINT is blocked
