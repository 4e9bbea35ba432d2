"""How the package is laid out: imports run downwards, between rooms as between files, and in no circle."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"cli"},
    {"plan"},
    {""},  # the package itself, which exports what users import
    {"pipelines"},
    {"convert"},
    {"sampling"},
    {"weights"},
    {"models"},
    {"parallel", "schedulers"},
    {"flags"},
    {"config", "json_config"},
    {"atomic_write", "validate"},
    {"errors", "interrupts"},
)
"""Rooms and single files of the package, from the top; each may import from those below it, and from itself."""

LINES = 500
"""Of the longest file; more than this holds more than one idea."""


def sources() -> dict[str, Path]:
    """Files by the name of the module that they are."""
    files = {}
    for folder, package in (("distrijax", ()), ("convert", ("distrijax",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*package, *path.relative_to(ROOT).with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


SOURCES = sources()


@cache
def imports(module: str) -> frozenset[str]:
    """The package's modules that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in inner}
    return frozenset(found & SOURCES.keys())


def floor(module: str) -> int:
    """Of a module, counted from the top."""
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_downwards(module):
    upwards = [other for other in imports(module) if floor(other) <= floor(module) and room(other) != room(module)]
    assert not upwards, f"{module} imports from its own floor or one above"


def test_every_room_has_a_floor():
    assert set(map(room, SOURCES)) == set().union(*FLOORS)


def test_no_files_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


def test_only_the_collectives_and_what_starts_processes_name_a_collective():
    named = {
        module
        for module, path in SOURCES.items()
        for word in ("lax.psum", "lax.ppermute", "lax.all_gather", "lax.all_to_all")
        if word in path.read_text(encoding="utf-8")
    }
    assert named == {"distrijax.parallel.collectives", "distrijax.parallel.processes"}


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("distrijax", "convert", "tests", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LINES
    }
    assert not long
