"""Revisions of this project in temporary folders, and processes that run with their package, whatever is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
WORKING_TREE = "working tree"


class Failure(Exception):
    """What a user is told in one sentence."""


def git(*words: str) -> bytes:
    """What git prints; raises Failure with its last line where it fails."""
    done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, check=False)
    if done.returncode:
        raise Failure(last_line(done.stderr.decode()))
    return done.stdout


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it failed without a word"])[-1]


def resolved(revision: str) -> str:
    """The commit's hash, or WORKING_TREE; raises Failure for what is no revision."""
    if revision == WORKING_TREE:
        return revision
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    except Failure as failure:
        raise Failure(
            f"{revision} is no revision ({failure}); give a branch, tag or commit that `git log` knows"
        ) from None


@contextlib.contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """A temporary folder with a revision's files, from which its package is imported whole."""
    with tempfile.TemporaryDirectory(prefix="same_as-") as name:
        folder = Path(name)
        if revision == WORKING_TREE:
            copy_working_tree(folder)
        else:
            archive = folder / ".tar"
            archive.write_bytes(git("archive", "--format=tar", revision))
            with tarfile.open(archive) as files:
                files.extractall(folder, filter="data")
            archive.unlink()
        join_packages(folder)
        yield folder


def copy_working_tree(folder: Path) -> None:
    """What git tracks or would add, as it is now."""
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0"):
        if name and (REPOSITORY / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target)


def join_packages(folder: Path) -> None:
    """Links every subpackage that lies elsewhere (setuptools' package-dir) to where Python looks for it."""
    settings = tomllib.loads((folder / "pyproject.toml").read_text())
    places = settings.get("tool", {}).get("setuptools", {}).get("package-dir", {})
    for package, place in sorted(places.items()):
        imported = folder.joinpath(*package.split("."))
        if package and not imported.exists():
            imported.symlink_to((folder / place).resolve(), target_is_directory=True)


def run(tree: Path, *words: str | Path, **variables: str) -> str:
    """What Python prints with a revision's package; raises Failure with the last line of its errors where it fails."""
    command = [sys.executable, *map(str, words)]
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        # the settings of a revision share compiled programs, two revisions do not
        "JAX_COMPILATION_CACHE_DIR": str(tree / ".programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{' '.join(command[1:])} ended with {done.returncode}: {last_line(done.stderr)}")
    return done.stdout
