"""benchmarks/same_as.py tells revisions apart that differ, and only those; its settings are such as the package takes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import revisions
import same_as
from facts import refuses

from distrijax import DEFAULT_MODEL, SCHEDULERS, DistriConfig

REVISION = """
from types import SimpleNamespace
import numpy as np
import distrijax.convert
DEFAULT_MODEL, DistriConfig = "tiny", dict

def load_pipeline(model, config, dtype=None):
    value = {"latent": 1, "np": distrijax.convert.VALUE}
    def call(prompt, *, output_type, **_):
        return SimpleNamespace(images=np.full((2, 2), value[output_type], np.float32))
    call.set_progress_bar_config = lambda disable: None
    return call
"""
"""Of a package whose latents are always the same, and whose images show a value out of its subpackage."""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits of a package that lies as this one does, with the values 0.5 and 0.75, and a working tree with 0.5."""
    folder = tmp_path / "repository"

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=folder, check=True)

    for name in ("distrijax", "convert"):
        (folder / name).mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[tool.setuptools]\npackage-dir = { "distrijax.convert" = "convert" }')
    (folder / "distrijax" / "__init__.py").write_text(REVISION)
    git("init", "--quiet", "--initial-branch=main")
    for value in (0.5, 0.75):
        (folder / "convert" / "__init__.py").write_text(f"VALUE = {value}")
        git("add", "--all")
        git("commit", "--quiet", "--message", str(value))
    (folder / "convert" / "__init__.py").write_text("VALUE = 0.5")
    monkeypatch.setattr(revisions, "REPOSITORY", folder)


def test_revisions_run_with_their_own_package_and_are_compared(repository, tmp_path, capsys):
    flags = ["--only", "1 device", "--keep", str(tmp_path / "kept")]
    with pytest.raises(SystemExit, match="^1$"):
        same_as.main(["main~1", "main", *flags])
    row = capsys.readouterr().out.splitlines()[1]
    assert re.match("1 device +equal +largest difference 0.25 ", row)
    (kept,) = (tmp_path / "kept").rglob("*.npz")
    np.savez(kept, latents=np.ones((2, 2), np.float32), image=np.full((2, 2), 0.5, np.float64))  # read, not run again
    with pytest.raises(SystemExit, match="^1$"):
        same_as.main(["main~1", *flags])
    assert "equal" in (row := capsys.readouterr().out.splitlines()[1]) and "float64[2, 2], now float32[2, 2]" in row
    same_as.main(["main~1", *flags[:2]])
    assert capsys.readouterr().out.splitlines()[2] == "1 settings: all equal"
    with refuses("nowhere", "revision", error=SystemExit):
        same_as.main(["nowhere"])
    with refuses("nothing", "1 device", "sync_mode", error=SystemExit):
        same_as.main(["main", "--only", "nothing"])


def test_settings_are_such_as_the_package_takes():
    for config, _, load in same_as.SETTINGS.values():
        assert DistriConfig(**same_as.USUAL.config | config).devices <= 8
        assert load.get("scheduler") in {None, *SCHEDULERS}
    tiny = same_as.Setting({"devices": 1}, {"height": 64, "width": 64, "num_inference_steps": 1})
    made = same_as.generate(DEFAULT_MODEL, tiny)
    assert {name: array.shape for name, array in made.items()} == {"latents": (1, 4, 8, 8), "image": (1, 64, 64, 3)}
    again = {**made, "latents": made["latents"] + np.float32(0.5)}
    assert same_as.verdict(made, made, "image") == "equal"
    assert same_as.verdict(made, again, "latents").startswith("largest difference 0.5")
    assert same_as.verdict(made, "why", "latents") == "AFTER failed: why"


def test_plans_are_compared_by_their_numbers():
    before = ["memory 13.5 MB of 85.1 GB", "projection 1.1 ms a step", "2 of 4 collective-permute asynchronous"]
    after = ["memory: 13.5 MB, of 85.1 GB on each", "projection 1.2 ms a step", "2 of 4 permutes asynchronous"]
    assert same_as.differing(before, before) == []
    assert same_as.differing(before, after) == [f"- {before[1]}", f"+ {after[1]}"]
    assert same_as.differing(before[:1], before[:2]) == ["- ", f"+ {before[1]}"]
    program = 'HloModule jit_x\n1 "file.py"\n %a.1 = f32[2] add(%b, %b), metadata={op_name="f/{g}" frame=1}, kind=x\n'
    other = program.replace("jit_x", "jit_y").replace("%b", "%c.3").replace("frame=1", "frame=2")
    assert same_as.plain_program(program) == " %0 = f32[2] add(%1, %1), kind=x" == same_as.plain_program(other)
    assert same_as.plain_program(program.replace("add", "sub")) != same_as.plain_program(program)


def test_start_up_and_a_step_are_timed_in_processes_of_their_own(repository):
    with revisions.tree_of("main") as tree:
        same_as.start_up(tree, tree)
        assert abs(float(same_as.worker(tree, "unet call", tree))) < 1  # a step of nothing


def test_times_of_each_repeat_are_compared(monkeypatch, capsys):
    times = iter([2.0, 3.0, 4.0, 2.0, 2.0, 4.0])  # before, after; after, before; before, after
    monkeypatch.setattr(same_as, "model_of", lambda tree: tree)
    monkeypatch.setattr(same_as, "start_up", lambda tree, model: None)
    monkeypatch.setattr(same_as, "times_of", lambda tree, model: {"start": next(times)})
    same_as.compare_times(Path("old"), Path("new"), repeats=3)
    told = " ".join(capsys.readouterr().out.splitlines()[1].split())
    assert told == "start 2 (2 to 2) 4 (3 to 4) 2 (1.5 to 2)"
