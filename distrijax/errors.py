"""Errors and warnings for users."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator


class DistriError(ValueError):
    """What went wrong, in one sentence: what was got, what is allowed, what to do. Every error for users is one of these."""


class InvalidArgument(DistriError):
    """An argument or option that cannot be used; the same call fails again."""


class CheckpointError(DistriError):
    """A checkpoint that cannot be found, is damaged or incomplete, or is of a model that is not supported."""


class OutOfMemory(DistriError):
    """A program needs more memory than the devices have free; a smaller image or batch may fit."""


class NotFinite(DistriError):
    """The generated image contains NaN or infinity."""


class DistriWarning(UserWarning):
    """A request could not be met in full; the image is generated all the same."""


@contextlib.contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Raises CheckpointError where a check in the context refuses a value, for the value is a checkpoint's and no argument."""
    try:
        yield
    except InvalidArgument as error:
        raise CheckpointError(str(error)) from None


def warn(sentence: str) -> None:
    """Issues a DistriWarning at the line that called this package. Of several processes, only process 0 warns.

    Args:
        sentence: The message.
    """
    import jax  # commands import errors before they may spend the seconds that JAX takes

    if jax.distributed.is_initialized() and jax.process_index() != 0:
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("distrijax."):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, DistriWarning, stacklevel=level)
