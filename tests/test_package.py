"""The package as users install it: complete, importable outside the checkout, and light."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"distrijax": "distrijax", "convert": "distrijax/convert"}
TORCH = {"torch", "transformers", "diffusers"}
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def python(*arguments: str | Path, cwd: Path) -> str:
    """What a new interpreter prints, without the environment's say on where to look for modules."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged; building in the checkout itself would leave files there."""
    folder = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """A folder into which the wheel is installed."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    python(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source, cwd=wheels)
    python(*PIP, "install", "--no-deps", "--no-index", "--target", target, *wheels.glob("*.whl"), cwd=wheels)
    return target


def imported(target: Path, cwd: Path) -> dict[str, str | None]:
    """Every module that is loaded, and its file, once the package in `target` is imported.

    The interpreter starts without `site` and learns of other packages last, so it does not find a distrijax that is
    installed beside the tests.
    """
    script = (
        "import json, site, sys; site.addsitedir(sys.argv[1]); sys.path.append(sys.argv[2]); "
        "import distrijax.convert; from distrijax import *; "
        "print(json.dumps({name: getattr(module, '__file__', None) for name, module in sys.modules.items()}))"
    )
    return json.loads(python("-S", "-c", script, target, sysconfig.get_path("purelib"), cwd=cwd))


def test_wheel_has_every_file_of_the_package(source, wheel):
    for folder, package in FOLDERS.items():
        files = {path.relative_to(source / folder) for path in (source / folder).rglob("*") if path.is_file()}
        installed = {path.relative_to(wheel / package) for path in (wheel / package).rglob("*") if path.is_file()}
        assert Path("__init__.py") in files
        assert sorted(files - installed) == []


def test_wheel_is_imported_outside_the_checkout_and_without_torch(wheel, tmp_path):
    modules = imported(wheel, tmp_path)
    assert Path(modules["distrijax.convert"]) == wheel / "distrijax" / "convert" / "__init__.py"
    assert sorted(modules.keys() & TORCH) == []


def test_editable_install_finds_convert(source, tmp_path):
    target = tmp_path / "installed"
    python(*PIP, "install", "--no-deps", "--no-build-isolation", "--target", target, "-e", source, cwd=tmp_path)
    assert Path(imported(target, tmp_path)["distrijax.convert"]) == source / "convert" / "__init__.py"
