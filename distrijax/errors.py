"""What a user is told: errors, and warnings, which one process gives for all."""

from __future__ import annotations

import sys
import warnings

import jax


class DistriError(ValueError):
    """Bad input, told in one sentence: what was got, what is allowed, what to do."""


class DistriWarning(UserWarning):
    """Something asked for could not be honoured in full; the picture is made all the same."""


def warn(sentence: str) -> None:
    """Issues a DistriWarning that names the line of whoever called this package; of several processes, process 0 alone."""
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("distrijax."):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, DistriWarning, stacklevel=level)
