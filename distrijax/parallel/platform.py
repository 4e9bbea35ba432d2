"""Choosing an implementation by platform, once for a whole program.

`jax.lax.platform_dependent` traces what is meant for every platform, in every layer. A program whose devices are known needs only
what is meant for theirs: `tracing_for` names their platform around the trace, and `platform_dependent` then traces nothing else.
Modules that are traced outside of it, in another library's program, are traced for all platforms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jax import lax

_platform: ContextVar[str | None] = ContextVar("platform", default=None)


@contextlib.contextmanager
def tracing_for(platform: str | None) -> Iterator[None]:
    """Names the platform for which everything is traced inside the context, on this thread.

    Args:
        platform: JAX's name for the devices' platform: "cpu", "gpu" or "tpu". None leaves the choice to an outer context, or to
            XLA's lowering.
    """
    token = _platform.set(platform or _platform.get())
    try:
        yield
    finally:
        _platform.reset(token)


def platform_dependent(*operands: Any, default: Callable[..., Any], **implementations: Callable[..., Any]) -> Any:
    """Calls the implementation for the platform of `tracing_for`; outside of one, as `jax.lax.platform_dependent`.

    Args:
        *operands: What each implementation takes.
        default: The implementation for platforms that are not named.
        **implementations: By platform, as `jax.lax.platform_dependent` names them: "cpu", "tpu", and "cuda" for NVIDIA's GPUs.
    """
    platform = _platform.get()
    if platform is None:
        return lax.platform_dependent(*operands, default=default, **implementations)
    return implementations.get("cuda" if platform == "gpu" else platform, default)(*operands)
