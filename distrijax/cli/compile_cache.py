"""Keeps compiled programs for the next process: in a folder of their own, of bounded size, without entries that were cut short.

JAX never replaces an entry that is there. One that could not be written whole (a full disk, a process that was killed) would be
compiled again in every run: such entries are removed before the first program, or as soon as JAX fails to read one.
"""

from __future__ import annotations

import os
import re
from glob import escape
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from distrijax.errors import warn

MOST = 4 << 30
"""Bytes of the folder; the programs that were used least recently are removed."""

UNREADABLE = r"Error reading persistent compilation cache entry for '(?P<program>[^']+)': (?!Timeout)"
"""How JAX's warning begins, but that another process held the folder for too long."""

WAIT = 10.0
"""Seconds to wait for another process that reads or writes."""


def keep_compiled_programs() -> None:
    """Keeps all programs, however fast they compiled, in JAX_COMPILATION_CACHE_DIR or in the user's cache folder.

    A folder that the user chose is not bounded, unless JAX_COMPILATION_CACHE_MAX_SIZE says so.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrijax" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
    except (OSError, Timeout) as error:
        warn(
            f"compiled programs are not kept, since {folder} can't be written ({error}); set XDG_CACHE_HOME to another folder"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", MOST)


def remove_unfinished(folder: Path) -> None:
    """Removes programs of which JAX did not write what it writes last: when they were used.

    Args:
        folder: JAX's cache of compiled programs.
    """
    with FileLock(folder / ".lockfile", timeout=WAIT):  # JAX's own
        for path in folder.glob("*-cache"):
            if not path.with_name(f"{path.name.removesuffix('-cache')}-atime").exists():
                path.unlink()


def remove_unreadable(warning: str) -> bool:
    """Removes the programs of the name that a warning of JAX gives, so that JAX writes them anew.

    Args:
        warning: The text of any warning.

    Returns:
        Whether it was such a warning.
    """
    found = re.match(UNREADABLE, warning)
    folder = jax.config.jax_compilation_cache_dir
    if found and folder:
        for path in Path(folder).glob(f"{escape(found['program'])}-*-cache"):
            path.unlink(missing_ok=True)
    return bool(found)
