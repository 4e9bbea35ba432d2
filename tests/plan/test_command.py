"""The command `distrijax plan`: what it refuses before anything is compiled, that it runs as a module, and what an image takes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from facts import refuses
from test_overlap import compiler

from distrijax import DEFAULT_MODEL
from distrijax.plan import __main__ as plan_command


def test_what_is_not_installed_is_told_before_anything_is_compiled(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plan_command, "compile_step", lambda *_, **__: pytest.fail("a step was compiled"))
    with refuses("--timeline", "matplotlib", "`plan`", error=SystemExit):
        plan_command.main(["--timeline", "x.png"])


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "distrijax.plan", "--help"]
    assert "--gpu" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@compiler
def test_the_command_projects_a_whole_image(capsys):
    """At four times the trained area: two kinds of steps at the trained size, two at the full one."""
    flags = ["--model", str(DEFAULT_MODEL), "--devices", "4", "--image-size", "512", "--no-baseline"]
    plan_command.main([*flags, "--num-inference-steps", "12", "--warmup-steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    told = [re.search(r"(\d+) x (\w+)(.*): projection (\S+) ms", line) for line in lines if line.startswith("image")]
    kinds = [(match[2], "256x256" in match[3]) for match in told]
    assert kinds == [("synchronous", True), ("displaced", True), ("synchronous", False), ("displaced", False)]
    counts, milliseconds = ([kind(match[index]) for match in told] for kind, index in ((int, 1), (float, 4)))
    assert sum(counts) == 12 and counts[0] == 2 and counts[2] == 1
    steps, decoding, image = map(float, re.findall(r"(\S+) s (?:for|an)", lines[-1]))
    assert steps == pytest.approx(
        sum(count * each / 1000 for count, each in zip(counts, milliseconds, strict=True)), rel=0.02
    )
    assert image == pytest.approx(steps + decoding, rel=0.02)
