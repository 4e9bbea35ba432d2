"""Starts a command before its slow imports: handles Ctrl-C, and supervises one of several processes.

If one of several processes dies, XLA aborts the others after a page of its log. An aborted process runs no more Python code;
so it is a child of a supervising process, which explains the abort in one line.
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
    "or does not answer: see the output of the others, and start all of them again"
)


def run(module: str, *, several: bool = False) -> None:
    """Runs `main` of a module as a command.

    Args:
        module: The module's name.
        several: Whether the command may run in several processes.
    """
    begin(several=several)
    importlib.import_module(module).main()


def begin(*, several: bool = False) -> None:
    """Makes Ctrl-C end this process with one line on stderr.

    Args:
        several: Whether the command may run in several processes; one of several continues in a supervised child.
    """
    given = any(argument.split("=")[0] in FLAGS for argument in sys.argv[1:])
    if several and (given or tasks() != 1):
        _continue_in_child()
    end_on_interrupt()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a name is no reason to lose an image
            stream.reconfigure(errors="backslashreplace")


def _continue_in_child() -> None:
    """Returns in a child process only; this process forwards signals to it, ends as it does, and explains an abort."""
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
    """Waits for the child and returns its status; forwards signals meanwhile."""
    while True:
        info = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
        if info.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
        elif info.si_code <= 0:  # sent by a process; the terminal's signals reach the child, too
            os.kill(child, info.si_signo)


def _end_as(status: int) -> None:
    """Ends this process with a child's status; after an abort, with a sentence and exit code 1."""
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
    """Ends the child if its parent was killed, which closes the pipe."""
    os.read(reading, 1)
    os._exit(1)
