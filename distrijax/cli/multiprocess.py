"""One script in several processes: its flags, process 0 alone to speak, and one sentence in each where one of them ends.

JAX's part is `distrijax.parallel.processes`. Where a process dies, is missing or falls silent, the collectives of the others
fail, or XLA writes a page and aborts them, whichever comes first; both become a sentence and exit code 1 here. And a process that
fails by itself leaves at once, without JAX's farewell, which would wait for the others while they wait for this one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from typing import BinaryIO, NoReturn, TextIO

import jax

from distrijax.parallel import processes

REASONS = {
    "RegisterTask": "not all processes arrived in time; start every one of them, and let all reach the coordinator",
    **dict.fromkeys(
        ("distributed service detected fatal errors", "Gloo", "NCCL", "oordination"),
        "another process of this run has ended or does not answer; see what it said, and start all again",
    ),
}
"""By words in errors of collectives and in XLA's log, what they tell of the other processes."""

_ending = threading.Lock()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--coordinator and its companions."""
    add = parser.add_argument_group("several processes, one for each host or device").add_argument
    add(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens; SLURM, Open MPI and TPU pods need no flags"
    )
    add("--num-processes", type=int, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    add(
        "--process-timeout",
        type=int,
        default=processes.TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for one that does not arrive or answer (default: %(default)s)",
    )


def join(arguments: argparse.Namespace, devices: int | None) -> None:
    """Starts this process as one of those that the flags or a launcher tell of; all but process 0 are silent from then on."""
    coordinates = arguments.coordinator, arguments.num_processes, arguments.process_id
    if any(value is not None for value in coordinates) or processes.tasks() != 1:
        _tell_aborts_in_a_sentence(_hide_native_output())
    processes.initialize(*coordinates, devices=devices, timeout=arguments.process_timeout)
    if not processes.is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Lets a failure of this process end the others, and tells of theirs in a sentence; for the whole of a script."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            told = isinstance(error.code, str)
            _end(error.code if told else "", 1 if told else error.code or 0)
        # ValueError, too: what fails is sometimes told only when a result is read
        _end(_reason(str(error)) or traceback.format_exc(), 1)


def _reason(text: str) -> str | None:
    """A sentence for what JAX tells of the other processes; None where it tells of something else."""
    return next((f"error: {sentence}" for words, sentence in REASONS.items() if words in text), None)


def _end(message: str, code: int) -> NoReturn:
    """Ends the process at once with what the first caller has to say; there may be two, in two threads."""
    _ending.acquire()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(message, file=sys.stderr, end="\n" if message else "", flush=True)
    os._exit(code)


def _hide_native_output() -> BinaryIO:
    """What libraries in C++ print goes to the file that is returned, Python's own where it always went."""
    hidden = tempfile.TemporaryFile()  # noqa: SIM115 (for the rest of the process)
    sys.stdout, sys.stderr = _moved(sys.stdout, hidden), _moved(sys.stderr, hidden)
    return hidden


def _moved(stream: TextIO, hidden: BinaryIO) -> TextIO:
    """A stream to where another one wrote, whose descriptor writes to `hidden` now."""
    stream.flush()
    own = os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
    os.dup2(hidden.fileno(), stream.fileno())
    return own


def _tell_aborts_in_a_sentence(hidden: BinaryIO) -> None:
    """Has XLA's abort tell that another process is lost in a sentence; what else aborts shows what it printed.

    The handler must be a function of C: Python runs its own between two instructions of the main thread, and abort() does
    not wait for those.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_):
        hidden.seek(0)
        text = hidden.read().decode(errors="replace")
        _end(_reason(text) or text, 1)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    _tell_aborts_in_a_sentence.handler = handler  # C keeps no reference
