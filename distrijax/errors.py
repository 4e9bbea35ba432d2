"""Errors and warnings for users."""

from __future__ import annotations

import sys
import warnings


class DistriError(ValueError):
    """Invalid input. The message is one sentence: what was got, what is allowed, what to do."""


class DistriWarning(UserWarning):
    """A request could not be met in full; the image is generated all the same."""


def warn(sentence: str) -> None:
    """Issues a DistriWarning at the line that called this package. Of several processes, only process 0 warns."""
    import jax  # commands import errors before they may spend the seconds that JAX takes

    if jax.distributed.is_initialized() and jax.process_index() != 0:
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("distrijax."):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, DistriWarning, stacklevel=level)
