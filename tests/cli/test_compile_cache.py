"""The folder of compiled programs: its own, of bounded size, and rid of what was cut short."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from distrijax.cli.compile_cache import remove_unfinished

XLA_LOG = re.compile(r"[IWE]\d{4} ")
"""Of older versions, which log the processor's features for each program that they load."""

SCRIPT = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from distrijax.cli import compile_cache
from distrijax.cli.options import plain_errors


def compiled(name):
    def function(x):
        return jnp.sin(x) @ x

    function.__name__ = name
    jax.clear_caches()
    jax.jit(function)(jnp.ones((4, 4))).block_until_ready()


def entries(name):
    return {path: path.read_bytes() for path in folder.glob(f"jit_{name}-*-cache")}


folder = Path(sys.argv[1], "distrijax", "programs")
with plain_errors():
    compile_cache.keep_compiled_programs()
    compiled("first")
    ((path, whole),) = entries("first").items()
    path.write_bytes(whole[:100])
    compiled("first")
    assert len(path.read_bytes()) > 100, "it was not replaced"
    compiled("second")
    assert entries("first"), "there was room for both"
    jax.config.update("jax_compilation_cache_max_size", sum(map(len, entries("*").values())))
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    compiled("third")
    assert entries("third") and not entries("first"), "the first one was used the longest ago"
"""


def test_entries_that_cannot_be_read_are_replaced_and_the_oldest_are_removed(tmp_path):
    script = f"import jax.experimental.compilation_cache.compilation_cache\n{SCRIPT}"
    without = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**without, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if not XLA_LOG.match(line)]
    assert (done.returncode, said) == (0, []), done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["distrijax"]


def test_entries_that_were_being_written_are_removed(tmp_path):
    for name in ("jit_a-1-cache", "jit_a-1-atime", "jit_b-2-cache", "other"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {".lockfile"} == {"jit_a-1-cache", "jit_a-1-atime", "other"}
