"""How a command starts, before the imports that take seconds: what Ctrl-C does, and what one of several processes does.

Where one of several processes dies, XLA aborts the others after a page of its log. No code of Python's runs in a process that is
aborted; so it is the child of another one, which says in a sentence what that means.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading

from distrijax.interrupts import end_on_interrupt
from distrijax.parallel.launchers import tasks

FLAGS = ("--coordinator", "--num-processes", "--process-id")
FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
ABORTED = (
    "error: this process was aborted, see the log above; most likely another process of this run did not arrive in time, has ended "
    "or does not answer: see what the others said, and start all again"
)


def run(module: str, *, several: bool = False) -> None:
    """Runs `main` of a module as a command. several: whether it may be one of several processes."""
    begin(several=several)
    importlib.import_module(module).main()


def begin(*, several: bool = False) -> None:
    """Has Ctrl-C end this process in a line. several: where it is one of several, it goes on in a child."""
    given = any(argument.split("=")[0] in FLAGS for argument in sys.argv[1:])
    if several and (given or tasks() != 1):
        _go_on_in_child()
    end_on_interrupt()


def _go_on_in_child() -> None:
    """Returns in a child process alone; this one hands on signals to it, ends as it does, and tells of an abort in a sentence."""
    reading, writing = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    child = os.fork()
    if child:
        os.close(reading)
        _end_as(_wait_for(child))
    os.close(writing)
    threading.Thread(target=_end_with_parent, args=(reading,), name="parent", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for(child: int) -> int:
    """The status with which the child ended."""
    while True:
        told = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
        if told.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
        elif told.si_code <= 0:  # from a process; what comes from the terminal comes to the child, too
            os.kill(child, told.si_signo)


def _end_as(status: int) -> None:
    """Ends this process as one with that status ended, but for an abort."""
    number = -os.waitstatus_to_exitcode(status)
    if number <= 0:
        os._exit(-number)
    if number == signal.SIGABRT:
        with contextlib.suppress(OSError):
            os.write(2, f"{ABORTED}\n".encode())
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with contextlib.suppress(OSError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _end_with_parent(reading: int) -> None:
    """Ends the child when its parent, whose end of the pipe nobody else has, was killed."""
    os.read(reading, 1)
    os._exit(1)
