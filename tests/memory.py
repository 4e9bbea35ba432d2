"""Keeping the tests' memory small: what a test no longer needs goes back to the system."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import jax


def memory(kind: str) -> float:
    """Of this process, in GB: resident now (`VmRSS`) or at most so far (`VmHWM`); 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith(f"{kind}:")), 0.0)


def give_memory_back() -> None:
    """Drops what JAX remembers of traced and compiled programs, and has glibc's allocator return what it keeps for later.

    Every compiled program holds memory maps, too, of which Linux gives a process 65530; XLA crashes when they run out.
    """
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
