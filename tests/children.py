"""Python in processes of its own."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def receiving_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile receive SIGINT; where these tests run in the background of a script, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
