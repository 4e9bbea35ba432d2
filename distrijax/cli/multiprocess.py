"""Commands in several processes: their flags, output of process 0 only, and one error line in each process if one of them fails.

`distrijax.parallel.processes` joins the processes. If one of them dies, is missing or does not answer, collectives fail in the
others: `fail_together` turns that into one line and exit code 1. Or XLA aborts them after a page of its log, which
`distrijax.cli.start` explains. A process that fails by itself ends at once, without `jax.distributed.shutdown`: that would wait
for the other processes while they wait for this one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from distrijax.parallel import processes

REASONS = {
    "RegisterTask": "not all processes arrived in time; start every one of them, and let all reach the coordinator",
    **dict.fromkeys(
        ("distributed service detected fatal errors", "Gloo", "NCCL", "oordination"),
        "another process of this run has ended or does not answer; see its output, and start all of them again",
    ),
}
"""What happened to another process, by words in the errors of collectives."""


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--coordinator`, `--num-processes`, `--process-id` and `--process-timeout`, which `join` reads.

    Args:
        parser: Receives the flags, as a group of their own.
    """
    add = parser.add_argument_group("several processes, one for each host or device").add_argument
    add(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens; SLURM, Open MPI and TPU pods need no flags"
    )
    add("--num-processes", type=int, metavar="N", help="number of processes")
    add("--process-id", type=int, metavar="I", help="number of this process, from 0")
    add(
        "--process-timeout",
        type=int,
        default=processes.TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for a process that does not arrive or answer (default: %(default)s)",
    )


def join(arguments: argparse.Namespace, devices: int | None) -> None:
    """Joins this process with the others that the flags or a launcher name; from then on only process 0 prints to stdout.

    Args:
        arguments: Of a parser with `add_process_flags`.
        devices: Number of devices of all processes together, if given.

    Raises:
        InvalidArgument: For invalid flags, and if this process could not join the others.
    """
    coordinates = arguments.coordinator, arguments.num_processes, arguments.process_id
    processes.initialize(*coordinates, devices=devices, timeout=arguments.process_timeout)
    if not processes.is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """A context for a whole script: one of several processes that fails ends the others, and each reports it in one line."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            text = isinstance(error.code, str)
            _end(error.code if text else "", 1 if text else error.code or 0)
        # any exception: some failures appear only when a result is read, as ValueError
        _end(_reason(str(error)) or traceback.format_exc(), 1)


def _reason(text: str) -> str | None:
    """The error line for a failure of another process; None for other errors of JAX."""
    return next((f"error: {sentence}" for words, sentence in REASONS.items() if words in text), None)


def _end(message: str, code: int) -> NoReturn:
    """Ends the process at once, with a message on stderr."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(message, file=sys.stderr, end="\n" if message else "", flush=True)
    os._exit(code)
