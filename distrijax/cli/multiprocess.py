"""One script in several processes: its flags, process 0 alone to speak, and one sentence in each where one of them ends.

JAX's part is `distrijax.parallel.processes`. Where a process dies, is missing or falls silent, the collectives of the others
fail, which becomes a sentence and exit code 1 here; or XLA writes a page and aborts them, of which `distrijax.cli.start` tells.
And a process that fails by itself leaves at once, without JAX's farewell, which would wait for the others while they wait for it.
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
        "another process of this run has ended or does not answer; see what it said, and start all again",
    ),
}
"""By words in errors of collectives, what they tell of the other processes."""


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
    """Ends the process at once."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(message, file=sys.stderr, end="\n" if message else "", flush=True)
    os._exit(code)
