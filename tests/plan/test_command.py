"""The command `distrijax plan`: what it refuses before anything is compiled, and that it runs as a module."""

from __future__ import annotations

import subprocess
import sys

import pytest
from facts import refuses

from distrijax.plan import __main__ as plan_command


def test_what_is_not_installed_is_told_before_anything_is_compiled(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plan_command, "compile_step", lambda *_, **__: pytest.fail("a step was compiled"))
    with refuses("--timeline", "matplotlib", "`plan`", error=SystemExit):
        plan_command.main(["--timeline", "x.png"])


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "distrijax.plan", "--help"]
    assert "--gpu" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
