"""The library prints nothing: it warns, logs (`logging.getLogger("distrijax")`) and raises. Commands print."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from distrijax.parallel.programs import Programs, Stage

ROOT = Path(__file__).parents[1]
COMMANDS = {"cli", "__main__.py"}
LIBRARY = [
    path.relative_to(ROOT)
    for folder in ("distrijax", "convert")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not COMMANDS & set(path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("file", LIBRARY, ids=str)
def test_the_library_prints_nothing(file):
    called = [node.func for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))) if isinstance(node, ast.Call)]
    names = {node.id for node in called if isinstance(node, ast.Name)}
    written = {ast.unparse(node) for node in called if isinstance(node, ast.Attribute)}
    assert "print" not in names
    assert not written & {"sys.stdout.write", "sys.stderr.write"}


def test_what_is_compiled_is_logged(caplog):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(np.ones(3, np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

    def halve(static, params, x):
        return x / static

    with caplog.at_level(logging.INFO, "distrijax"):
        programs = Programs("cpu", max_programs=1)
        for static in (2.0, 4.0):
            programs(Stage(halve), static, (), x)
    said = [record.getMessage() for record in caplog.records if record.name == "distrijax"]
    assert sorted(line.split()[0] for line in said) == ["compiled", "compiled", "evicted"]
    assert all("halve" in line for line in said)
